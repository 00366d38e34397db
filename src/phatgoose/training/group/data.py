"""The data of a group: batches of its experts, each in the order of its own training alone.

Axes: E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from transformers import Trainer

from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.training.group.batch import Batch, Row, assemble, encode_rows

MakeTrainer = Callable[[Sequence[int], Sequence[int]], Trainer]


class GroupData:
    """Batches of the experts that train together, each in the order of transformers' Trainer for it alone.

    Args:
        encoder: the base model's encoder.
        examples: training examples of each expert.
        validation: validation examples of each expert; empty for an expert without.
        make_trainer: returns the Trainer of an expert alone, given the indices of its
            training and validation examples as datasets.
        length_multiple: S is rounded up to a multiple of it, so that few shapes occur.
        with_mask: whether the model needs an attention mask.
        equal_targets: pad all experts to the same number of targets (see `assemble`).
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
            # An expert at the end of its data may have fewer batches in this step than the others
            shares = [1 / len(batches) for batches in orders]
            yield [self._batch(self._rows, indices, shares) for indices in _side_by_side(orders)]

    def evaluation(self) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield all validation rows in batches, each with its number of rows of each expert, shape (E,)."""
        orders = [
            _indices(trainer.get_eval_dataloader()) if rows else []
            for trainer, rows in zip(self.trainers, self._validation, strict=True)
        ]
        for indices in _side_by_side(orders):
            yield self._batch(self._validation, indices, [1.0] * len(orders)), torch.tensor(list(map(len, indices)))

    def _batch(self, rows: Sequence[Sequence[Row]], indices: Sequence[Sequence[int]], shares: Sequence[float]) -> Batch:
        return assemble(
            [[some[i] for i in chosen] for some, chosen in zip(rows, indices, strict=True)],
            shares,
            num_rows=self._batch_size,
            pad_id=self._pad_id,
            length_multiple=self._length_multiple,
            with_mask=self._with_mask,
            equal_targets=self._equal_targets,
        )


def _training_order(trainer: Trainer, first: int) -> Iterator[list[list[int]]]:
    """The batches of each optimiser step from `first` on, as indices of examples."""
    loader: Any = trainer.get_train_dataloader()
    accumulation, last = trainer.args.gradient_accumulation_steps, trainer.args.max_steps
    steps_per_epoch = trainer.set_initial_training_values(trainer.args, loader)[1]
    for start in range(first - first % steps_per_epoch, last, steps_per_epoch):
        end = min(last, start + steps_per_epoch)
        loader.set_epoch(start // steps_per_epoch)
        batches = _indices(loader, (end - start) * accumulation)
        for step in range(max(first, start) - start, end - start):
            yield batches[step * accumulation : (step + 1) * accumulation]


def _indices(loader: Any, most: int | None = None) -> list[list[int]]:
    # The loader draws from the global random generator; the model's dropout must not notice
    with torch.random.fork_rng(devices=[]):
        return list(islice(loader, most))


def _side_by_side(orders: Sequence[Sequence[list[int]]]) -> Iterator[list[list[int]]]:
    """The experts' first batches, then their second ones, and so on; empty for an expert that has no more."""
    for at in range(max(map(len, orders))):
        yield [batches[at] if at < len(batches) else [] for batches in orders]
