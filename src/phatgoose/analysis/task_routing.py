"""The routing of one task, averaged over its tokens.

Axes: M sites, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskRouting:
    """Means over a task's rows of means over a row's tokens. NaN for a site that saw no token.

    Attributes:
        suite, task: names.
        data: sha256 of the rows.
        num_rows: number of rows.
        num_tokens: number of tokens, on both sides of an encoder-decoder.
        masked: experts that were masked out of the pool.
        weights_ME: routing weights.
        entropy_all_M: entropy (nats) of the softmax over all experts' scores.
        entropy_chosen_M: entropy (nats) of the chosen experts' weights.
        usable_M: number of experts that a token could choose: those that adapt the site and are not masked.
    """

    suite: str
    task: str
    data: str
    num_rows: int
    num_tokens: int
    masked: tuple[str, ...]
    weights_ME: Array
    entropy_all_M: Array
    entropy_chosen_M: Array
    usable_M: Array
