"""Batches of several experts: each expert's rows in the order of its training alone."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.data import encoder_of, make_examples
from helpers.models import llama
from phatgoose.config import GateConfig
from phatgoose.data.encoder import Encoder
from phatgoose.training.group.batch import Batch
from phatgoose.training.group.data import GroupData
from phatgoose.training.trainer import make_trainer


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_order_is_the_trainers(accumulation: int, tmp_path: Path) -> None:
    """Each expert reads what transformers' Trainer gives it alone, also from the middle on."""
    model = llama()
    encoder = encoder_of(model)
    config = GateConfig(steps=11, batch_size=4, accumulation=accumulation)
    experts = [make_examples(number, seed) for seed, number in enumerate((24, 5, 18))]

    read: list[list[list[list[int]]]] = []
    for examples in experts:
        batches: list[list[list[int]]] = []

        def collate(rows: list[dict[str, list[int]]], into: list[list[list[int]]] = batches) -> dict[str, torch.Tensor]:
            into.append([row["input_ids"] for row in rows])
            batch = encoder.collate(rows)
            batch["targets"] = batch.pop("labels")
            return batch

        trainer = make_trainer(
            model,
            config,
            tmp_path,
            save_steps=10**6,
            dataset=[encoder.encode(example) for example in examples],
            validation=[],
            collate=collate,
        )
        trainer.train()
        read.append(batches)

    def alone(rows: Any, validation: Any) -> Any:
        return make_trainer(
            model, config, tmp_path, save_steps=10**6, dataset=rows, validation=validation, collate=list
        )

    data = GroupData(encoder, experts, [(), (), ()], alone, length_multiple=1, with_mask=True)
    found = {first: [rows_of(data.steps(first), e, encoder) for e in range(3)] for first in (0, 7)}
    for e in range(3):
        # the Trainer's loader reads a batch ahead of what is trained on
        assert found[0][e] == read[e][: len(found[0][e])]
        assert len(read[e]) - len(found[0][e]) <= 1
        assert len(found[7][e]) >= 4
        assert found[7][e] == found[0][e][-len(found[7][e]) :]


def rows_of(steps: Iterable[list[Batch]], expert: int, encoder: Encoder) -> list[list[list[int]]]:
    """The batches of one of three experts, without padding and empty rows."""
    batches = []
    for batch in (batch for step in steps for batch in step):
        ids_RS = batch.inputs["input_ids"].unflatten(0, (3, -1))[expert].tolist()
        lengths_R = batch.inputs["attention_mask"].sum(dim=1).unflatten(0, (3, -1))[expert].tolist()
        rows = [ids[:length] for ids, length in zip(ids_RS, lengths_R, strict=True)]
        rows = [row for row in rows if row != [encoder.pad_id]]
        if rows:
            batches.append(rows)
    return batches
