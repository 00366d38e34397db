"""phatgoose compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from phatgoose.config import BootstrapConfig, RouterConfig
from phatgoose.report.console import WIDE, print_table


def compare(
    results: Annotated[list[Path], typer.Argument(help="Folders that phatgoose eval wrote, one for each seed's pool.")],
    against: Annotated[str, typer.Option(help="Compare the other methods with this one.")] = RouterConfig.router,
    suite: Annotated[str | None, typer.Option(help="Only these suites, separated by commas.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for comparison.md and comparison.html; the first of RESULTS.")
    ] = None,
    experts: Annotated[bool, typer.Option("--experts", help="List every single expert, not only the best.")] = False,
    common: Annotated[bool, typer.Option("--common", help="Only tasks that all methods of a suite have.")] = False,
    above_chance: Annotated[
        bool, typer.Option("--above-chance", help="Only tasks on which some method is better than method chance.")
    ] = False,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.")] = BootstrapConfig.num_resamples,
    confidence: Annotated[float, typer.Option(help="Of the intervals.")] = BootstrapConfig.confidence,
    seed: Annotated[int, typer.Option(help="Of the resampling.")] = BootstrapConfig.seed,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON instead of tables.")] = False,
) -> None:
    """Compare evaluated methods, with intervals; write tables and a page with plots."""
    import json

    from phatgoose.errors import ResultsError

    try:
        from phatgoose.results.comparison import compare as compare_results
        from phatgoose.results.comparison import to_json
    except ImportError as error:
        raise ResultsError("compare needs scipy", found=str(error), fix="pip install 'phatgoose[eval]'") from error
    from phatgoose.files import replacing
    from phatgoose.results.page import write_comparison_page
    from phatgoose.results.reader import read_results
    from phatgoose.results.tables import all_tables, markdown

    config = BootstrapConfig(num_resamples=resamples, confidence=confidence, seed=seed)
    rows, warnings = read_results(results)
    for warning in warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    suites = [name.strip() for name in suite.split(",") if name.strip()] if suite else None
    comparison = compare_results(
        rows,
        against=against,
        suites=suites,
        experts=experts,
        common=common,
        above_chance=above_chance,
        bootstrap=config,
    )

    folder = out or results[0]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "comparison.md") as temporary:
            temporary.write_text(markdown(comparison), encoding="utf-8")
        write_comparison_page(folder / "comparison.html", comparison)
    except OSError as error:
        raise ResultsError(
            f"{folder} cannot be written to", found=str(error), fix="name another folder with --out"
        ) from error
    if as_json:
        typer.echo(json.dumps(to_json(comparison), ensure_ascii=False))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = WIDE
        for table in all_tables(comparison):
            print_table(console, table)
    typer.echo(f"wrote {folder / 'comparison.md'} and {folder / 'comparison.html'}", err=True)
