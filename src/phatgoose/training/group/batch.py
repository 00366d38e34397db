"""Batches of several experts: each expert's rows, padded and put side by side.

Axes: E experts, B = E * rows sequences (ordered by expert, equally many for each),
S positions, M target tokens of all experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example

Ids = np.ndarray[Any, np.dtype[np.int32]]


class Row(NamedTuple):
    """One example as token ids.

    Attributes:
        input_ids: input of the model, or of its encoder.
        decoder_input_ids: input of the decoder; None for a decoder-only model.
        positions: positions that predict target tokens.
        targets: the target tokens that they predict.
    """

    input_ids: Ids
    decoder_input_ids: Ids | None
    positions: Ids
    targets: Ids


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Everything that one forward pass of several experts needs.

    Attributes:
        inputs: the model's inputs by name; int64, shape (B, S).
        positions_M: positions that predict target tokens, indices into B * S.
        targets_M: the target tokens; IGNORED for padding.
        experts_M: the expert of each target token.
        weights_E: factor of the sum of each expert's losses.
    """

    inputs: dict[str, torch.Tensor]
    positions_M: torch.Tensor
    targets_M: torch.Tensor
    experts_M: torch.Tensor
    weights_E: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """A copy of this batch on `device`."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)

        return Batch(
            inputs={name: move(tensor) for name, tensor in self.inputs.items()},
            positions_M=move(self.positions_M),
            targets_M=move(self.targets_M),
            experts_M=move(self.experts_M),
            weights_E=move(self.weights_E),
        )


def encode_rows(encoder: Encoder, examples: Sequence[Example]) -> list[Row]:
    """Encode examples as rows."""
    return [_row(encoded) for encoded in encoder.encode_all(examples)]


def _row(encoded: dict[str, list[int]]) -> Row:
    labels = np.array(encoded["labels"], dtype=np.int32)
    (positions,) = np.nonzero(labels != IGNORED)
    decoder_input_ids = encoded.get("decoder_input_ids")
    return Row(
        input_ids=np.array(encoded["input_ids"], dtype=np.int32),
        decoder_input_ids=None if decoder_input_ids is None else np.array(decoder_input_ids, dtype=np.int32),
        positions=positions.astype(np.int32),
        targets=labels[positions],
    )


def assemble(
    rows: Sequence[Sequence[Row]],
    shares: Sequence[float],
    *,
    num_rows: int,
    pad_id: int,
    length_multiple: int = 1,
    with_mask: bool = True,
    equal_targets: bool = False,
) -> Batch:
    """Pad the experts' rows into one batch; an expert with fewer than `num_rows` rows gets empty ones.

    Args:
        rows: the rows of each expert; at least one row in all.
        shares: weight of each expert's mean loss within its optimiser step.
        num_rows: rows of each expert in the batch.
        pad_id: token id that fills short rows on the right.
        length_multiple: S is rounded up to a multiple of it.
        with_mask: whether to make an attention mask.
        equal_targets: pad all experts to the same number of targets, which an output
            head with LoRAs needs: it splits them into E equal parts.
    """
    inputs = _inputs(rows, num_rows, pad_id, length_multiple, with_mask)
    length = inputs.get("decoder_input_ids", inputs["input_ids"]).shape[1]
    counts = [sum(len(row.targets) for row in some) for some in rows]
    room = [max(counts)] * len(rows) if equal_targets else counts
    starts = np.concatenate([[0], np.cumsum(room)])
    total = int(starts[-1])
    positions = np.zeros(total if equal_targets else _few_sizes(total), dtype=np.int64)
    targets = np.full(len(positions), IGNORED, dtype=np.int64)
    experts = np.zeros(len(positions), dtype=np.int64)
    for e, some in enumerate(rows):
        if some:
            own = slice(starts[e], starts[e] + counts[e])
            first = e * num_rows
            positions[own] = np.concatenate([(first + r) * length + row.positions for r, row in enumerate(some)])
            targets[own] = np.concatenate([row.targets for row in some])
            experts[own] = e
    weights = [share / tokens if tokens else 0.0 for tokens, share in zip(counts, shares, strict=True)]
    return Batch(
        inputs={name: torch.from_numpy(ids) for name, ids in inputs.items()},
        positions_M=torch.from_numpy(positions),
        targets_M=torch.from_numpy(targets),
        experts_M=torch.from_numpy(experts),
        weights_E=torch.tensor(weights),
    )


def _inputs(
    rows: Sequence[Sequence[Row]], num_rows: int, pad_id: int, length_multiple: int, with_mask: bool
) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
    """The model's inputs by name, shape (B, S); see `assemble`."""
    flat = [row for some in rows for row in some]
    places = [e * num_rows + r for e, some in enumerate(rows) for r in range(len(some))]
    size = len(rows) * num_rows

    def padded(some: Sequence[Ids]) -> np.ndarray[Any, np.dtype[np.int64]]:
        length = _round_up(max(map(len, some)), length_multiple)
        ids = np.full((size, length), pad_id, dtype=np.int64)
        for place, row in zip(places, some, strict=True):
            ids[place, : len(row)] = row
        return ids

    inputs = {"input_ids": padded([row.input_ids for row in flat])}
    if with_mask:
        lengths = np.ones(size, dtype=np.int64)  # some attention kernels give NaN for a row that is all padding
        lengths[places] = [len(row.input_ids) for row in flat]
        inputs["attention_mask"] = (np.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).astype(np.int64)
    if flat[0].decoder_input_ids is not None:
        inputs["decoder_input_ids"] = padded([row.decoder_input_ids for row in flat])  # type: ignore[misc]
    return inputs


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _few_sizes(number: int) -> int:
    """`number` rounded up, so that the allocator sees few sizes; a thousand targets cost little beside a batch."""
    return min(1 << (number - 1).bit_length(), _round_up(number, 1024))
