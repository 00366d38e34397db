"""A group's batch: whose rows are where, and what counts."""

from __future__ import annotations

import pytest

from helpers.data import encoder_of
from helpers.models import llama, t5
from phatgoose.data.encoder import IGNORED
from phatgoose.data.examples import Example
from phatgoose.training.group.batch import assemble, encode_rows


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
