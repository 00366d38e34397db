"""The datasets of a pool's experts as tasks: suites held-in and leave-one-out.

A dataset is the file `t0hi/<name>.jsonl.gz` in the data folder; its own expert
is the pool's expert of that name. The task has the rows of split `validation`:
those with choices, scored by rank classification; if there are none, all rows,
scored by ROUGE-L of a greedy answer.

In `held-in` the dataset's own expert is in the pool. In `leave-one-out` it is
masked out, so that each dataset is a task that no expert was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phatgoose.evaluation.suites.rows import TaskRow, read_split
from phatgoose.evaluation.suites.task import SuiteTask

FOLDER = "t0hi"
SPLIT = "validation"
MAX_NEW_TOKENS = 128


class HeldInTask(SuiteTask):
    """A dataset as a task, whose metric depends on its rows."""

    @property
    def metric(self) -> str:
        """`multiple_choice` if its rows have choices, else `rouge_l`."""
        return "multiple_choice" if self.rows[0].choices is not None else "rouge_l"

    @property
    def max_new_tokens(self) -> int:
        """Most tokens of an answer."""
        return MAX_NEW_TOKENS

    def _file_rows(self, path: Path) -> Sequence[TaskRow]:
        rows = list(read_split(path, SPLIT))
        return [row for row in rows if row.choices is not None] or rows


def held_in_tasks(suite: str, names: Sequence[str], data: Path, limit: int | None) -> list[HeldInTask]:
    """Tasks for the datasets in `names` that have a file in the data folder."""
    return [
        HeldInTask(
            {
                "task": f"{suite}_{name}",
                "output_type": "multiple_choice",
                "num_fewshot": 0,
                "metadata": {
                    "suite": suite,
                    "file": f"{FOLDER}/{name}.jsonl.gz",
                    "data": str(data),
                    "limit": limit,
                },
            }
        )
        for name in names
        if (data / FOLDER / f"{name}.jsonl.gz").is_file()
    ]
