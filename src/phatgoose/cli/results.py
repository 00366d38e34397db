"""phatgoose compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.config_options import Fields, config_options
from phatgoose.cli.options import AsJson, comma_list
from phatgoose.config import BootstrapConfig, RouterConfig
from phatgoose.report.console import WIDE, print_table


@config_options
def compare(
    *,
    results: Annotated[list[Path], typer.Argument(help="Folders that phatgoose eval wrote, one per training seed.")],
    against: Annotated[str, typer.Option(help="Method with which the others are compared.")] = RouterConfig.router,
    suite: Annotated[str | None, typer.Option(help="Compare only these suites, separated by commas.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for comparison.md and comparison.html; by default the first results folder."),
    ] = None,
    experts: Annotated[bool, typer.Option("--experts", help="List every single expert, not only the best.")] = False,
    common: Annotated[
        bool, typer.Option("--common", help="Average only over the tasks that all methods of a suite have.")
    ] = False,
    above_chance: Annotated[
        bool, typer.Option("--above-chance", help="Average only over the tasks on which some method beats chance.")
    ] = False,
    bootstrap: Annotated[BootstrapConfig, Fields("confidence", "seed", num_resamples="resamples")],
    as_json: AsJson = False,
) -> None:
    """Compare evaluated methods, with intervals; write tables and a page with plots."""
    import json

    from phatgoose.errors import ResultsError

    try:
        from phatgoose.results import comparison
    except ImportError as error:
        raise ResultsError("compare needs scipy", found=str(error), fix="pip install 'phatgoose[eval]'") from error
    from phatgoose.files import replacing
    from phatgoose.results.page import write_comparison_page
    from phatgoose.results.reader import read_results
    from phatgoose.results.tables import all_tables, markdown

    rows, warnings = read_results(results)
    for warning in warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    compared = comparison.compare(
        rows,
        against=against,
        suites=comma_list(suite) if suite else None,
        experts=experts,
        common=common,
        above_chance=above_chance,
        bootstrap=bootstrap,
    )

    folder = out or results[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "comparison.md") as temporary:
            temporary.write_text(markdown(compared), encoding="utf-8")
        write_comparison_page(folder / "comparison.html", compared)
    except OSError as error:
        raise ResultsError(
            f"{folder} cannot be written to", found=str(error), fix="name another folder with --out"
        ) from error
    if as_json:
        typer.echo(json.dumps(comparison.to_json(compared), ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = WIDE
        for table in all_tables(compared):
            print_table(console, table)
    typer.echo(f"wrote {folder / 'comparison.md'} and {folder / 'comparison.html'}", err=True)
