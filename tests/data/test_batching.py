"""Batches by length: every item once, in the limits, of similar length."""

from __future__ import annotations

from itertools import pairwise

import pytest

from helpers.data import token_ids
from phatgoose.data.batching import by_length

LENGTHS = [1 + token for token in token_ids(200, seed=3).tolist()]
COUNTS = [1 + token % 4 for token in token_ids(200, seed=4).tolist()]


def test_by_hand() -> None:
    lengths = [3, 9, 3, 5, 4]
    assert list(by_length(lengths)) == [[1, 3, 4, 0, 2]]
    assert list(by_length(lengths, shortest_first=True)) == [[0, 2, 4, 3, 1]]
    assert list(by_length(lengths, max_items=2)) == [[1, 3], [4, 0], [2]]
    assert list(by_length(lengths, max_positions=10)) == [[1], [3, 4], [0, 2]]
    assert list(by_length(lengths, max_positions=10, shortest_first=True)) == [[0, 2], [4, 3], [1]]
    assert list(by_length(lengths, num_sequences=[1, 2, 2, 1, 1], max_positions=12)) == [[1], [2], [3, 4], [0]]
    assert list(by_length([])) == []


@pytest.mark.parametrize("shortest_first", [False, True])
@pytest.mark.parametrize("max_positions", [1, 40, 300, None])
@pytest.mark.parametrize("max_items", [1, 7, None])
@pytest.mark.parametrize("counts", [None, COUNTS])
def test_limits_hold_and_batches_are_full(
    counts: list[int] | None, max_items: int | None, max_positions: int | None, shortest_first: bool
) -> None:
    batches = list(
        by_length(
            LENGTHS,
            num_sequences=counts,
            max_positions=max_positions,
            max_items=max_items,
            shortest_first=shortest_first,
        )
    )
    assert sorted(i for batch in batches for i in batch) == list(range(len(LENGTHS)))
    width = counts or [1] * len(LENGTHS)

    def fits(batch: list[int]) -> bool:
        positions = len(batch) * width[batch[0]] * max(LENGTHS[i] for i in batch)
        return (
            len({width[i] for i in batch}) == 1
            and (max_items is None or len(batch) <= max_items)
            and (max_positions is None or positions <= max_positions)
        )

    assert all(fits(batch) or len(batch) == 1 for batch in batches)
    for batch, following in pairwise(batches):
        assert not fits([*batch, following[0]])
    order = [(width[i], LENGTHS[i]) for batch in batches for i in batch]
    assert order == sorted(order, key=lambda pair: (-pair[0], pair[1] if shortest_first else -pair[1]))
