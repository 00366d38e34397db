"""One row of a results folder: the scores of a method on a task, with one seed.

Axes: C examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROWS_FILE = "rows.jsonl"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One cell of a grid: a method on a task, with one seed.

    Attributes:
        suite, task, method, seed: the cell.
        metric: name of the mean score, such as "accuracy"; from 0 to 1.
        score: mean over the evaluated rows.
        pool: fingerprint of the pool.
        pool_name: its name, for people.
        base: name of the base model.
        data: sha256 of the evaluated rows.
        text: settings with which rows became tokens.
        dtype: dtype of the base model's weights.
        config: the router's settings.
        example_ids: ids of the C examples, sorted. A row renders an example with
            one template; an example may have several rows.
        sums_C: sum of the scores of each example's rows.
        counts_C: number of rows of each example.
        source: file and line, for error messages.
    """

    suite: str
    task: str
    method: str
    seed: int
    metric: str
    score: float
    pool: str
    pool_name: str
    base: str
    data: str
    text: Any
    dtype: Any
    config: Any
    example_ids: NDArray[np.str_]
    sums_C: NDArray[np.float64]
    counts_C: NDArray[np.float64]
    source: str

    @property
    def cell(self) -> tuple[str, str, str, int]:
        """Suite, task, method and seed: unique among the rows of a pool."""
        return self.suite, self.task, self.method, self.seed
