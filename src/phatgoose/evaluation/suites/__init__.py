"""Suites: the paper's evaluation protocols, and two on the datasets of a pool's experts.

    t0ho           T0's 11 held-out tasks, all original-task templates
    bbh            22 BIG-bench Hard tasks, zero-shot
    bbl            17 BIG-bench Lite tasks, zero-shot
    held-in        the validation split of the datasets of the pool's experts
    leave-one-out  the same, with each dataset's own expert masked out of the pool

The first three are also groups of lm-eval tasks (`t0ho`, `t0ho_rte`, ...), one
YAML file per task in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from phatgoose.errors import SuiteError
from phatgoose.results.names import LEAVE_ONE_OUT, PAPER, SUITES

if TYPE_CHECKING:
    from phatgoose.evaluation.suites.task import SuiteTask
    from phatgoose.experts.pool import Pool

TASKS = Path(__file__).parent / "tasks"


def load_tasks(
    suites: Sequence[str],
    pool: Pool,
    *,
    data: Path | None = None,
    names: Sequence[str] = (),
    limit: int | None = None,
) -> list[SuiteTask]:
    """The tasks of suites, in order; their rows are not read yet.

    Args:
        suites: names in `SUITES`.
        pool: the pool whose experts' datasets are the tasks of held-in and leave-one-out.
        data: the data folder; None to read datasets from the hub.
        names: names of tasks within their suites; all tasks if empty.
        limit: most rows of a task, a seeded sample; None for all rows.

    Raises:
        SuiteError: an unknown suite or task, or a suite without tasks.
    """
    tasks: list[SuiteTask] = []
    for suite in dict.fromkeys(suites):
        if suite not in SUITES:
            raise SuiteError(f"unknown suite {suite!r}", expected=", ".join(SUITES))
        tasks += _paper_tasks(suite, data, limit) if suite in PAPER else _pool_tasks(suite, pool, data, limit)
    known = sorted({task.name for task in tasks})
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SuiteError(f"no task {unknown[0]!r} in {', '.join(suites)}", expected=", ".join(known))
    return [task for task in tasks if not names or task.name in names]


def _paper_tasks(suite: str, data: Path | None, limit: int | None) -> list[SuiteTask]:
    from lm_eval.tasks import TaskManager

    metadata = {"data": None if data is None else str(data), "limit": limit}
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata=metadata)
    return list(manager.load([suite])["tasks"].values())


def _pool_tasks(suite: str, pool: Pool, data: Path | None, limit: int | None) -> list[SuiteTask]:
    from phatgoose.evaluation.suites.held_in import FOLDER, held_in_tasks

    if data is None:
        raise SuiteError(f"suite {suite} reads files", expected=f"{FOLDER}/<expert>.jsonl.gz", fix="--data DIR")
    if suite == LEAVE_ONE_OUT and len(pool) < 2:
        raise SuiteError(
            f"pool {pool.folder} is too small for {suite}", found=f"{len(pool)} experts", expected="two or more"
        )
    tasks = held_in_tasks(suite, pool.names, data, limit)
    if not tasks:
        raise SuiteError(
            f"suite {suite} has no task for pool {pool.folder}",
            found=f"in {data / FOLDER} no file of any expert ({', '.join(pool.names)})",
            expected=f"{FOLDER}/<expert>.jsonl.gz",
            fix="--data DIR with the datasets on which the experts were trained",
        )
    return list(tasks)
