"""The datasets of a pool's experts as tasks: held-in, and leave-one-out.

A dataset is `t0hi/<name>.jsonl.gz` in the data folder, its expert the one of
the same name in the pool, its rows those of the split `validation`. If some of
its rows have choices, the task is those rows, scored by rank classification;
else it is all rows, scored by ROUGE-L of a greedy answer.

In `held-in` the dataset's own expert is in the pool. In `leave-one-out` it is
masked out, so that each dataset is a task that no expert was trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from phatgoose.evaluation.suites.rows import Row, read_split
from phatgoose.evaluation.suites.task import SuiteTask

FOLDER = "t0hi"
SPLIT = "validation"
MAX_NEW_TOKENS = 128


class HeldInTask(SuiteTask):
    """One dataset; its metric depends on its rows."""

    @property
    def metric(self) -> str:
        """`multiple_choice` if there are rows with choices, else `rouge_l`."""
        return "multiple_choice" if self.rows[0].choices is not None else "rouge_l"

    @property
    def max_new_tokens(self) -> int:
        """Of an answer."""
        return MAX_NEW_TOKENS

    def _file_rows(self, path: Path) -> Sequence[Row]:
        rows = list(read_split(path, SPLIT))
        return [row for row in rows if row.choices is not None] or rows


def held_in_tasks(suite: str, names: Sequence[str], data: Path, limit: int | None) -> list[HeldInTask]:
    """Tasks for those of `names` that have a file in the data folder."""
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
