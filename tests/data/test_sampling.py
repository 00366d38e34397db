"""Seeded samples; recorded fingerprints of data depend on which rows they are."""

from __future__ import annotations

from phatgoose.data.sampling import sample


def test_sample() -> None:
    rows = [f"row {i}" for i in range(10)]
    assert sample(rows, 4, seed=0) == ["row 6", "row 9", "row 0", "row 2"]
    assert sample(rows, 4, seed=1) != sample(rows, 4, seed=0)
    every = sample(rows, 99, seed=0)
    assert every != rows and sorted(every) == rows
