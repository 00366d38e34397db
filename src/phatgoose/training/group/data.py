"""Batches of several experts: each expert's rows in its own order, side by side.

Axes: E experts, B = E * rows sequences (ordered by expert, as many for each),
S positions, M target tokens of all experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import Trainer

from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example

Ids = np.ndarray[Any, np.dtype[np.int32]]
MakeTrainer = Callable[[Sequence[int], Sequence[int]], Trainer]


class Row(NamedTuple):
    """One example as numbers.

    Attributes:
        input_ids: what the model, or its encoder, reads.
        decoder_input_ids: what the decoder reads; None for a decoder-only model.
        positions: where target tokens are predicted.
        targets: the target tokens.
    """

    input_ids: Ids
    decoder_input_ids: Ids | None
    positions: Ids
    targets: Ids


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass of several experts needs.

    Attributes:
        inputs: of the model; int64, shape (B, S).
        positions_M: which of the B * S positions predict target tokens.
        targets_M: the target tokens; IGNORED where there is padding.
        experts_M: whose they are.
        weights_E: what the sum of an expert's losses is multiplied with.
    """

    inputs: dict[str, torch.Tensor]
    positions_M: torch.Tensor
    targets_M: torch.Tensor
    experts_M: torch.Tensor
    weights_E: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """This batch on a device."""

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
    """Examples as numbers."""
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


class GroupData:
    """The rows of the experts that train together, in the order that transformers' Trainer gives to each alone.

    Args:
        encoder: of the base model.
        examples: of each expert, to train on.
        validation: of each expert; empty for those that have none.
        make_trainer: makes the Trainer of an expert alone, from the numbers of
            its examples and of its validation examples; they are its dataset.
        length_multiple: S is rounded up to a multiple of it, so that few shapes occur.
        with_mask: whether the model must be told where padding is.
        equal_targets: see `assemble`.
    """

    def __init__(
        self,
        encoder: Encoder,
        examples: Sequence[Sequence[Example]],
        validation: Sequence[Sequence[Example]],
        make_trainer: MakeTrainer,
        *,
        length_multiple: int,
        with_mask: bool,
        equal_targets: bool = False,
    ) -> None:
        self._pad_id = encoder.pad_id
        self._length_multiple = length_multiple
        self._with_mask = with_mask
        self._equal_targets = equal_targets
        self._rows = [encode_rows(encoder, some) for some in examples]
        self._validation = [encode_rows(encoder, some) for some in validation]
        self.trainers = [
            make_trainer(range(len(train)), range(len(valid)))
            for train, valid in zip(self._rows, self._validation, strict=True)
        ]
        self._batch_size: int = self.trainers[0].args.per_device_train_batch_size

    def steps(self, first: int = 0) -> Iterator[list[Batch]]:
        """The batches of each optimiser step from `first` to the last one."""
        for orders in zip(*(_training_order(trainer, first) for trainer in self.trainers), strict=True):
            # an expert at the end of its data may have fewer batches in this step than the others
            shares = [1 / len(batches) for batches in orders]
            yield [self._batch(self._rows, numbers, shares) for numbers in _side_by_side(orders)]

    def evaluation(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """All validation rows: batches, and how many rows of each expert they hold, shape (E,)."""
        orders = [
            _numbers(trainer.get_eval_dataloader()) if rows else []
            for trainer, rows in zip(self.trainers, self._validation, strict=True)
        ]
        for numbers in _side_by_side(orders):
            yield self._batch(self._validation, numbers, [1.0] * len(orders)), torch.tensor(list(map(len, numbers)))

    def _batch(self, rows: Sequence[Sequence[Row]], numbers: Sequence[Sequence[int]], shares: Sequence[float]) -> Batch:
        return assemble(
            [[some[number] for number in chosen] for some, chosen in zip(rows, numbers, strict=True)],
            shares,
            num_rows=self._batch_size,
            pad_id=self._pad_id,
            length_multiple=self._length_multiple,
            with_mask=self._with_mask,
            equal_targets=self._equal_targets,
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
    """Pad the rows of each expert into one batch; an expert with fewer than `num_rows` gets empty ones.

    Args:
        rows: of each expert; not all of them empty.
        shares: what each expert's mean loss counts in a step.
        num_rows: rows of each expert in the batch.
        pad_id: fills short rows on the right.
        length_multiple: the length is rounded up to a multiple of it.
        with_mask: whether to make an attention mask.
        equal_targets: pad each expert's targets to as many as the others', as an
            output head with LoRAs wants them: in E equal parts.
    """
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
        lengths = np.ones(size, dtype=np.int64)  # attention among no positions at all is NaN in some kernels
        lengths[places] = [len(row.input_ids) for row in flat]
        inputs["attention_mask"] = (np.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).astype(np.int64)
    if flat[0].decoder_input_ids is not None:
        inputs["decoder_input_ids"] = padded([row.decoder_input_ids for row in flat])  # type: ignore[misc]
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


def _training_order(trainer: Trainer, first: int) -> Iterator[list[list[int]]]:
    """For each optimiser step from `first` on: its batches, as numbers of examples."""
    loader: Any = trainer.get_train_dataloader()
    accumulation, last = trainer.args.gradient_accumulation_steps, trainer.args.max_steps
    steps_per_epoch = trainer.set_initial_training_values(trainer.args, loader)[1]
    for start in range(first - first % steps_per_epoch, last, steps_per_epoch):
        end = min(last, start + steps_per_epoch)
        loader.set_epoch(start // steps_per_epoch)
        batches = _numbers(loader, (end - start) * accumulation)
        for step in range(max(first, start) - start, end - start):
            yield batches[step * accumulation : (step + 1) * accumulation]


def _numbers(loader: Any, most: int | None = None) -> list[list[int]]:
    # A loader draws from the global generator, which belongs to the model's dropout
    with torch.random.fork_rng(devices=[]):
        return list(islice(loader, most))


def _side_by_side(orders: Sequence[Sequence[list[int]]]) -> Iterator[list[list[int]]]:
    """The first batches of all experts, then the second ones, ...; empty for those that have no more."""
    for at in range(max(map(len, orders))):
        yield [batches[at] if at < len(batches) else [] for batches in orders]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _few_sizes(number: int) -> int:
    """`number` rounded up, so that an allocator meets few sizes; a thousand targets cost little beside a batch."""
    return min(1 << (number - 1).bit_length(), _round_up(number, 1024))
