"""Seeded samples: the same rows in every run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def sample(rows: Sequence[T], number: int, seed: int) -> list[T]:
    """Draw `number` rows without replacement, in random order; all of them, shuffled, if there are not as many.

    Which positions are drawn depends on the seed and the number of rows only.
    """
    return random.Random(seed).sample(list(rows), min(number, len(rows)))
