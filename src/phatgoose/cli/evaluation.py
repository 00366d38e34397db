"""phatgoose eval and phatgoose lm-eval."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.cli.config_options import Fields, config_options
from phatgoose.cli.options import (
    Device,
    ModelDtype,
    PoolBase,
    PoolOption,
    Separator,
    SkipMissing,
    Suites,
    TaskData,
    TaskNames,
    comma_list,
    load_suites,
    need_lm_eval,
)
from phatgoose.config import SEEDS, EvaluationConfig
from phatgoose.errors import ConfigError


@config_options
def evaluate(
    *,
    pool: PoolOption,
    suite: Suites,
    router: Annotated[
        str,
        typer.Option(
            help="Methods, separated by commas: routers, with options if wanted ('phatgoose top_k=1'); base; "
            "expert:NAME, or experts for all; own (the dataset's own expert, held-in only); chance (no model runs); "
            "multitask:ADAPTER, a folder outside the pool."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Results folder; cells that it already has are not evaluated again.")],
    data: TaskData = None,
    task: TaskNames = None,
    limit: Annotated[
        int | None, typer.Option(help="Rows per task, a seeded sample that is the same for all methods.")
    ] = None,
    seed: Annotated[str, typer.Option(help="Random seeds of the routers, separated by commas.")] = "0",
    top_k: Annotated[
        int | None, typer.Option(help="Experts per token and layer, for the routers that take top_k.")
    ] = None,
    skip_missing: SkipMissing = False,
    config: Annotated[EvaluationConfig, Fields("batch_tokens", "answer_tokens")],
    text: Separator,
    base: PoolBase = None,
    dtype: ModelDtype = None,
    device: Device = None,
) -> None:
    """Evaluate methods on suites of tasks.

    A killed run resumes at the first unfinished cell when the same command is given again.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit must be at least 1", found=str(limit), expected="1 or more, or none")
    seeds = _seeds(seed)
    need_lm_eval()

    from phatgoose.data.encoder import Encoder
    from phatgoose.evaluation import grid
    from phatgoose.evaluation.methods import parse_methods
    from phatgoose.experts.checks import check_base_name
    from phatgoose.experts.pool import Pool
    from phatgoose.models.base import load_base, load_tokenizer, placement
    from phatgoose.results.writer import ResultsFolder

    opened = Pool.open(pool)
    name = check_base_name(pool, opened.base, base)
    methods = parse_methods(comma_list(router), opened, top_k)
    results = ResultsFolder(out, opened.fingerprint)
    tasks = load_suites(suite, opened, data=data, task=task, limit=limit, skip_missing=skip_missing)
    dtype, device = placement(dtype, device)
    cells = grid.plan(tasks, methods, seeds, base=name, dtype=dtype, limit=limit, text=text)
    pending = [cell for cell in cells if results.find(cell.key) is None]
    typer.echo(f"{len(cells)} cells, {len(cells) - len(pending)} of them there already", err=True)
    if pending:
        model = load_base(name, opened.base.revision, dtype=dtype, device=device)
        encoder = Encoder(load_tokenizer(name, opened.base.revision), model.config, text)
        grid.evaluate(pending, model, encoder, opened, results, config)
    typer.echo(f"rows: {out / 'rows.jsonl'}\nnext: phatgoose compare {out}")


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval's own command line: phatgoose lm-eval run --help.

    It then knows pools (--model phatgoose --model_args pool=P,router=phatgoose,top_k=2) and, by --include_path, the
    suites (--tasks t0ho,bbh,bbl --metadata data=DIR).
    """
    need_lm_eval()

    from lm_eval.__main__ import cli_evaluate

    import phatgoose.evaluation.harness  # noqa: F401
    from phatgoose.evaluation.suites import TASKS

    arguments = list(context.args)
    if len(arguments) > 1 and not any(argument.startswith("--include_path") for argument in arguments):
        arguments += ["--include_path", str(TASKS)]
    sys.argv = ["phatgoose lm-eval", *arguments]
    cli_evaluate()


def _seeds(text: str) -> list[int]:
    parts = comma_list(text)
    if not parts or not all(part.isdecimal() and int(part) < SEEDS for part in parts):
        raise ConfigError(
            f"seeds are whole numbers up to {SEEDS - 1}, separated by commas",
            found=repr(text),
            expected="such as 0,1,2",
        )
    return list(dict.fromkeys(map(int, parts)))
