"""phatgoose record and phatgoose analyse."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.config import Dtype, RecordingConfig, RouterConfig, TextConfig
from phatgoose.errors import ConfigError


def record(
    pool: Annotated[Path, typer.Argument(help="The pool's folder.")],
    suite: Annotated[str, typer.Option(help="Separated by commas: t0ho, bbh, bbl, held-in, leave-one-out.")],
    out: Annotated[Path, typer.Option(help="Recording folder; finished tasks are added to it, and not done again.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files; the hub if not given.")] = None,
    router: Annotated[
        str, typer.Option(help="The router, with options if you like ('phatgoose top_k=1').")
    ] = RouterConfig.router,
    task: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    limit: Annotated[int, typer.Option(help="Rows of each task: a seeded sample.")] = RecordingConfig.limit,
    seed: Annotated[
        int, typer.Option(help="Of what the router draws; give each training seed's pool another one.")
    ] = RecordingConfig.seed,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go on without tasks that have no data.")
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option(help="Positions of a batch, padding included.")
    ] = RecordingConfig.batch_tokens,
    separator: Annotated[
        str, typer.Option(help="Text between input and target (decoder-only models), as in training.")
    ] = TextConfig.separator,
    base: Annotated[str | None, typer.Option(help="Base model; the one that the pool names if not given.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="bf16 on a GPU and fp32 on a CPU if not given.")] = None,
    device: Annotated[str | None, typer.Option(help='Such as "cuda" or "cpu"; a GPU if there is one.')] = None,
) -> None:
    """Record where a router sends the tokens of tasks, for phatgoose analyse.

    A run that was killed goes on with the first task that it did not finish when the same command is given again.
    """
    from phatgoose.cli.evaluation import need_lm_eval, split

    config, text = RecordingConfig(limit=limit, batch_tokens=batch_tokens, seed=seed), TextConfig(separator=separator)
    need_lm_eval()

    from transformers import set_seed

    from phatgoose.analysis.recorder import record_tasks
    from phatgoose.data.encoder import Encoder
    from phatgoose.evaluation.grid import with_data
    from phatgoose.evaluation.methods import parse_methods
    from phatgoose.evaluation.suites import load_tasks
    from phatgoose.experts.checks import check_base_name
    from phatgoose.experts.pool import Pool
    from phatgoose.models.base import load_base, load_tokenizer, placement
    from phatgoose.routing.model import RoutedModel

    opened = Pool.open(pool)
    name = check_base_name(pool, opened.base, base)
    methods = parse_methods([router], opened)
    method = methods[0]
    if method.router is None or method.router.expert is not None:
        raise ConfigError(f"{router!r} routes nothing", expected="a router over the whole pool")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(split(suite), opened, data=data, names=split(task or ""), limit=limit)
    tasks, missing = with_data(tasks)
    if missing and not (skip_missing and tasks):
        raise missing[0]
    for error in missing:
        typer.echo(f"left out: {error.what} ({error.found})", err=True)
    dtype, device = placement(dtype, device)
    set_seed(config.seed)
    loaded = load_base(name, opened.base.revision, dtype=dtype, device=device)
    tokenizer = load_tokenizer(name, opened.base.revision)
    model = RoutedModel.from_pool(loaded, opened, tokenizer=tokenizer, **asdict(method.router))
    encoder = Encoder(tokenizer, loaded.config, text)
    there = record_tasks(model, encoder, tasks, method, config, out)
    typer.echo(f"{len(tasks)} tasks, {there} of them there already", err=True)
    typer.echo(f"recording: {out}\nnext: phatgoose analyse {out} --out FOLDER")


def analyse(
    recordings: Annotated[list[Path], typer.Argument(help="Folders that phatgoose record wrote, one for each seed.")],
    out: Annotated[Path, typer.Option(help="Folder for figures/, analysis.html, analysis.md and analysis.json.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(help="Folder that phatgoose eval wrote for the same pools; may be repeated. For the Oracle."),
    ] = None,
    heatmap: Annotated[
        list[str] | None,
        typer.Option(help="suite/task whose layers are drawn; may be repeated. Four held-out tasks if not given."),
    ] = None,
) -> None:
    """Draw where the tokens of tasks go: figures, tables and a page, from recordings."""
    import json
    from importlib.util import find_spec

    for package in ("matplotlib", "scipy"):
        if find_spec(package) is None:
            raise ConfigError(f"analyse needs {package}", fix="pip install 'phatgoose[analysis]'")

    from phatgoose.analysis.figures import draw, remove_older, save
    from phatgoose.analysis.page import write_analysis_page
    from phatgoose.analysis.summary import analyse as work_out
    from phatgoose.analysis.tables import markdown, to_json
    from phatgoose.files import replacing
    from phatgoose.results.reader import read_results

    rows, warnings = read_results(results) if results else ([], [])
    for warning in warnings:
        typer.secho(f"warning: {warning}", err=True, fg=typer.colors.YELLOW)
    analysis = work_out(recordings, rows, heatmaps=heatmap or ())
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
