"""Batches of several experts: whose rows are where, what counts, and in which order."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checks import fails
from helpers.data import as_text, encoder_of, make_examples
from helpers.models import MODELS, llama, t5
from phatgoose.config import BatchingConfig, GateConfig
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example
from phatgoose.errors import ConfigError
from phatgoose.training.group.batch import Batch, assemble, encode_rows
from phatgoose.training.group.data import GroupData
from phatgoose.training.group.jobs import TrainingJob, check_names, read_jobs
from phatgoose.training.group.model import needs_mask
from phatgoose.training.group.plan import training_groups
from phatgoose.training.trainer import make_trainer


def test_assemble() -> None:
    """Two experts, the second with a row less than the first."""
    encoder = encoder_of(llama())
    rows = encode_rows(
        encoder,
        [
            Example(input="<5> <6>", target="<7>"),
            Example(input="<8>", target="<9> <10> <11>"),
            Example(input="<12> <13> <14>", target="<15>"),
        ],
    )
    batch = assemble([rows[:2], rows[2:]], [1.0, 0.5], num_rows=2, pad_id=0, length_multiple=3)
    eos = encoder.eos_id
    assert batch.inputs["input_ids"].tolist() == [
        [5, 6, 7, 0, 0, 0],
        [8, 9, 10, 11, 0, 0],
        [12, 13, 14, 15, 0, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    # an empty row attends to its first position, because nothing at all would be NaN
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [3, 4, 4, 1]
    assert batch.positions_M.tolist() == [1, 2, 6, 7, 8, 9, 14, 15]
    assert batch.targets_M.tolist() == [7, eos, 9, 10, 11, eos, 15, eos]
    assert batch.experts_M.tolist() == [0] * 6 + [1] * 2
    equal = assemble([rows[:2], rows[2:]], [1.0, 0.5], num_rows=2, pad_id=0, length_multiple=3, equal_targets=True)
    assert equal.positions_M.tolist() == [1, 2, 6, 7, 8, 9, 14, 15, 0, 0, 0, 0]
    assert equal.targets_M.tolist() == [7, eos, 9, 10, 11, eos, 15, eos] + [IGNORED] * 4
    assert batch.weights_E.tolist() == pytest.approx([1 / 6, 0.5 / 2])


def test_assemble_encoder_decoder() -> None:
    """Targets are at the decoder's positions."""
    encoder = encoder_of(t5())
    rows = encode_rows(encoder, [Example(input="<5> <6> <7>", target="<8>"), Example(input="<9>", target="<10> <11>")])
    batch = assemble([[rows[0]], [rows[1]]], [1.0, 1.0], num_rows=1, pad_id=0)
    assert batch.inputs["decoder_input_ids"].tolist() == [[0, 8, 0], [0, 10, 11]]
    assert batch.positions_M.tolist() == [0, 1, 3, 4, 5, 0, 0, 0]
    assert batch.targets_M[5:].tolist() == [IGNORED] * 3
    assert batch.experts_M.tolist() == [0, 0, 1, 1, 1, 0, 0, 0]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


@pytest.mark.parametrize("accumulation", [1, 3])
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


def test_groups_are_of_like_length_and_size(tmp_path: Path) -> None:
    encoder = encoder_of(llama())
    lengths = [30, 3, 12, 28, 4, 11, 5]
    jobs = [
        TrainingJob(folder=tmp_path / f"e{i}", examples=make_examples(20, seed=i, longest=n))
        for i, n in enumerate(lengths)
    ]
    finished = [False] * 6 + [True]
    groups = training_groups(jobs, finished, encoder, BatchingConfig(experts_at_once=2), 4, ".training")
    assert [[job.name for job in group] for group in groups] == [["e1", "e4"], ["e5", "e2"], ["e3", "e0"]]
    four = BatchingConfig(experts_at_once=4)
    assert [len(group) for group in training_groups(jobs, [False] * 7, encoder, four, 4, ".training")] == [3, 4]
    assert training_groups(jobs, [True] * 7, encoder, four, 4, ".training") == []


def test_groups_of_short_rows_are_larger(tmp_path: Path) -> None:
    encoder = encoder_of(llama())
    jobs = [
        TrainingJob(folder=tmp_path / f"e{i}", examples=[Example(input=as_text([5] * (n - 1)), target="<6>")] * 3)
        for i, n in enumerate([40, 10, 10, 20, 10, 20, 10, 100])
    ]
    batching = BatchingConfig(experts_at_once=3, positions_at_once=160)
    groups = training_groups(jobs, [False] * 8, encoder, batching, 4, ".training")
    # four rows of 10, 20 and 40 positions each; an expert too long for any batch still gets one
    assert [[job.name for job in group] for group in groups] == [
        ["e1", "e2", "e4"],
        ["e6", "e3"],
        ["e5"],
        ["e0"],
        ["e7"],
    ]


def test_jobs_from_files(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"input": "<5>", "target": "<6>"}\n')
    jobs = read_jobs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", "train", None)
    assert [(job.name, job.folder) for job in jobs] == [("a", tmp_path / "out" / "a"), ("b", tmp_path / "out" / "b")]
    fails(
        ConfigError,
        "two experts are named 'a'",
        action=lambda: check_names([jobs[0], TrainingJob(folder=tmp_path / "a", examples=[])]),
    )
    fails(ConfigError, "a.csv", ".jsonl.gz", action=lambda: read_jobs([Path("a.csv")], tmp_path, "train", None))
    fails(ConfigError, "'_a'", action=lambda: read_jobs([tmp_path / "_a.jsonl"], tmp_path, "train", None))


def test_kinds_of_models() -> None:
    assert {kind: needs_mask(factory()) for kind, factory in MODELS.items()} == {
        "llama": False,
        "gpt2": False,
        "t5": True,
    }
