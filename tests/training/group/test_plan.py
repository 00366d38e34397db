"""Which experts train together."""

from __future__ import annotations

from pathlib import Path

from helpers.data import as_text, encoder_of, make_examples
from helpers.models import llama
from phatgoose.config import BatchingConfig
from phatgoose.data.examples import Example
from phatgoose.training.group.jobs import TrainingJob
from phatgoose.training.group.plan import training_groups


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
