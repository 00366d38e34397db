"""phatgoose eval and phatgoose lm-eval."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from phatgoose.config import SEEDS, Dtype, EvaluationConfig, TextConfig
from phatgoose.errors import ConfigError


def evaluate(
    pool: Annotated[Path, typer.Option(help="The pool's folder.")],
    suite: Annotated[str, typer.Option(help="Separated by commas: t0ho, bbh, bbl, held-in, leave-one-out.")],
    router: Annotated[
        str,
        typer.Option(
            help="Separated by commas: routers, each with options if you like ('phatgoose top_k=1'); base; "
            "expert:NAME, or experts for all; own (the dataset's own expert, held-in only); chance (no model runs); "
            "multitask:ADAPTER, a folder outside the pool."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Results folder; finished cells are added to it, and not done again.")],
    data: Annotated[Path | None, typer.Option(help="Folder of the tasks' files; the hub if not given.")] = None,
    task: Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")] = None,
    limit: Annotated[int | None, typer.Option(help="Rows of each task: a seeded sample, the same for all.")] = None,
    seed: Annotated[str, typer.Option(help="Seeds of what routers draw, separated by commas.")] = "0",
    top_k: Annotated[int | None, typer.Option(help="Experts per token and layer, of routers that take it.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Go on without tasks that have no data.")
    ] = False,
    batch_tokens: Annotated[
        int, typer.Option(help="Positions of a batch, padding included.")
    ] = EvaluationConfig.batch_tokens,
    answer_tokens: Annotated[
        int | None, typer.Option(help="Positions of a batch of answers that are written; --batch-tokens if not given.")
    ] = EvaluationConfig.answer_tokens,
    separator: Annotated[
        str, typer.Option(help="Text between input and target (decoder-only models), as in training.")
    ] = TextConfig.separator,
    base: Annotated[str | None, typer.Option(help="Base model; the one that the pool names if not given.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="bf16 on a GPU and fp32 on a CPU if not given.")] = None,
    device: Annotated[str | None, typer.Option(help='Such as "cuda" or "cpu"; a GPU if there is one.')] = None,
) -> None:
    """Evaluate methods on suites of tasks.

    A run that was killed goes on with the first cell that it did not finish when the same command is given again.
    """
    if limit is not None and limit < 1:
        raise ConfigError("limit must be at least 1", found=str(limit), expected="1 or more, or none")
    config = EvaluationConfig(batch_tokens=batch_tokens, answer_tokens=answer_tokens)
    text = TextConfig(separator=separator)
    seeds = _seeds(seed)
    need_lm_eval()

    from phatgoose.data.encoder import Encoder
    from phatgoose.evaluation.methods import parse_methods
    from phatgoose.evaluation.suites import load_tasks
    from phatgoose.experts.checks import check_base_name
    from phatgoose.experts.pool import Pool
    from phatgoose.models.base import load_base, load_tokenizer, placement
    from phatgoose.results.writer import ResultsFolder

    opened = Pool.open(pool)
    name = check_base_name(pool, opened.base, base)
    methods = parse_methods(split(router), opened, top_k)
    results = ResultsFolder(out, opened.fingerprint)
    # its warnings are about settings that this command makes
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(split(suite), opened, data=data, names=split(task or ""), limit=limit)

    from phatgoose.evaluation.grid import evaluate, plan, with_data

    tasks, missing = with_data(tasks)
    if missing and not (skip_missing and tasks):
        raise missing[0]
    for error in missing:
        typer.echo(f"left out: {error.what} ({error.found})", err=True)
    dtype, device = placement(dtype, device)
    cells = plan(tasks, methods, seeds, base=name, dtype=dtype, limit=limit, text=text)
    pending = [cell for cell in cells if results.find(cell.key) is None]
    typer.echo(f"{len(cells)} cells, {len(cells) - len(pending)} of them there already", err=True)
    if pending:
        model = load_base(name, opened.base.revision, dtype=dtype, device=device)
        encoder = Encoder(load_tokenizer(name, opened.base.revision), model.config, text)
        evaluate(pending, model, encoder, opened, results, config)
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


def need_lm_eval() -> None:
    """Raise ConfigError if lm-eval, which suites are made of, is not installed."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise ConfigError("tasks of suites need lm-eval", fix="pip install 'phatgoose[eval]'")


def split(text: str) -> list[str]:
    """Parts of a text with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _seeds(text: str) -> list[int]:
    parts = split(text)
    if not parts or not all(part.isdecimal() and int(part) < SEEDS for part in parts):
        raise ConfigError(
            f"seeds are whole numbers up to {SEEDS - 1}, separated by commas",
            found=repr(text),
            expected="such as 0,1,2",
        )
    return list(dict.fromkeys(map(int, parts)))
