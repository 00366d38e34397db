"""phatgoose record and phatgoose analyse."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.config_options import config_options
from phatgoose.cli.options import (
    Device,
    ModelDtype,
    PoolBase,
    PoolFolder,
    Separator,
    SkipMissing,
    Suites,
    TaskData,
    TaskNames,
    load_suites,
    need_lm_eval,
)
from phatgoose.config import RecordingConfig, RouterConfig
from phatgoose.errors import ConfigError


@config_options
def record(
    *,
    pool: PoolFolder,
    suite: Suites,
    out: Annotated[Path, typer.Option(help="Recording folder; tasks that it already has are not recorded again.")],
    data: TaskData = None,
    router: Annotated[
        str, typer.Option(help="Router, with options if wanted ('phatgoose top_k=1').")
    ] = RouterConfig.router,
    task: TaskNames = None,
    config: RecordingConfig,
    skip_missing: SkipMissing = False,
    text: Separator,
    base: PoolBase = None,
    dtype: ModelDtype = None,
    device: Device = None,
) -> None:
    """Record where a router sends the tokens of tasks, for phatgoose analyse.

    A killed run resumes at the first unfinished task when the same command is given again.
    """
    need_lm_eval()

    from transformers import set_seed

    from phatgoose.analysis.recorder import record_tasks
    from phatgoose.data.encoder import Encoder
    from phatgoose.evaluation.methods import parse_methods
    from phatgoose.experts.checks import check_base_name
    from phatgoose.experts.pool import Pool
    from phatgoose.routing.model import RoutedModel

    opened = Pool.open(pool)
    check_base_name(pool, opened.base, base)
    method = parse_methods([router], opened)[0]
    if method.router is None or method.router.expert is not None:
        raise ConfigError(f"{router!r} routes nothing", expected="a router over the whole pool")
    tasks = load_suites(suite, opened, data=data, task=task, limit=config.limit, skip_missing=skip_missing)
    set_seed(config.seed)
    model = RoutedModel.from_pool(base, opened, dtype=dtype, device=device, **asdict(method.router))
    encoder = Encoder(model.tokenizer, model.config, text)
    there = record_tasks(model, encoder, tasks, method, config, out)
    typer.echo(f"{len(tasks)} tasks, {there} of them there already", err=True)
    typer.echo(f"recording: {out}\nnext: phatgoose analyse {out} --out FOLDER")


def analyse(
    recordings: Annotated[
        list[Path], typer.Argument(help="Folders that phatgoose record wrote, one per training seed.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for figures/, analysis.html, analysis.md and analysis.json.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            help="Folder that phatgoose eval wrote for the same pools, for the Oracle's figures; may be repeated."
        ),
    ] = None,
    heatmap: Annotated[
        list[str] | None,
        typer.Option(help="Task whose layers are drawn, as suite/task; may be repeated. By default four of them."),
    ] = None,
) -> None:
    """Draw where the tokens of tasks go: figures, tables and a page, from recordings."""
    import json
    from importlib.util import find_spec

    for package in ("matplotlib", "scipy"):
        if find_spec(package) is None:
            raise ConfigError(f"analyse needs {package}", fix="pip install 'phatgoose[analysis]'")

    from phatgoose.analysis import summary
    from phatgoose.analysis.figures import draw, remove_older, save
    from phatgoose.analysis.page import write_analysis_page
    from phatgoose.analysis.tables import markdown, to_json
    from phatgoose.files import replacing
    from phatgoose.results.reader import read_results

    rows, warnings = read_results(results) if results else ([], [])
    for warning in warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    analysis = summary.analyse(recordings, rows, heatmaps=heatmap or ())
    for note in analysis.notes:
        typer.echo(note, err=True)
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    plots = draw(analysis)
    remove_older(figures)
    for plot in plots:
        save(plot, figures)
    with replacing(out / "analysis.json") as temporary:
        temporary.write_text(json.dumps(to_json(analysis), ensure_ascii=False) + "\n", encoding="utf-8")
    with replacing(out / "analysis.md") as temporary:
        temporary.write_text(markdown(analysis), encoding="utf-8")
    write_analysis_page(out / "analysis.html", analysis, plots, figures)
    typer.echo(f"{len(plots)} figures, as PNG and SVG: {figures}\npage: {out / 'analysis.html'}")
