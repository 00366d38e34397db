"""Batches of similar length, so that little of a batch is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def by_length(
    lengths: Sequence[int],
    *,
    num_sequences: Sequence[int] | None = None,
    max_positions: int | None = None,
    max_items: int | None = None,
    shortest_first: bool = False,
) -> Iterator[list[int]]:
    """Put items into batches of similar length.

    A batch closes when its next item would exceed a limit; an item that exceeds
    one alone is a batch of its own. Items of equal length keep their order.

    Args:
        lengths: positions of each item's longest sequence.
        num_sequences: sequences that each item adds to a batch (targets of a prompt,
            beams); None for 1 each. All items of one batch add the same number.
        max_positions: most positions of a batch, padding included: its sequences times
            its longest length. None for no limit.
        max_items: most items of a batch; None for no limit.
        shortest_first: start with the shortest item instead of the longest.

    Yields:
        Indices into `lengths`, a list for each batch; every index once. Items with
        the most sequences come first.
    """
    counts = num_sequences or [1] * len(lengths)
    sign = 1 if shortest_first else -1
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-counts[i], sign * lengths[i])):
        if batch:
            longest = max(lengths[batch[0]], lengths[i])
            fits = (
                counts[i] == counts[batch[0]]
                and (max_positions is None or (len(batch) + 1) * counts[i] * longest <= max_positions)
                and (max_items is None or len(batch) < max_items)
            )
            if not fits:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch
