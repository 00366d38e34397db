"""Provenance as it lies on disk: old files and new ones are alike, byte for byte."""

from __future__ import annotations

import json

import pytest

import phatgoose
from phatgoose.experts.provenance import ActivationsProvenance, EmbeddingsProvenance, GateProvenance, Provenance

VECTORS = {"base": "tiny", "revision": None, "data": "d", "adapter_sha256": "a"}
END = {"settings": {"seed": 3}, "phatgoose": "0.1.0", "format": 1}


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (GateProvenance, VECTORS | {"steps": 100, "learning_rate": 5e-3, "seed": 42} | END),
        (ActivationsProvenance, VECTORS | {"num_examples": 7} | END),
        (
            EmbeddingsProvenance,
            {"encoder": "e", "data": "d", "num_examples": 7, "seed": 3, "phatgoose": "0.1.0", "format": 1},
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_order_on_disk(kind: type[Provenance], values: dict[str, object]) -> None:
    """The order in which 0.1.0 wrote the fields."""
    assert json.dumps(kind(**values).to_json()) == json.dumps(values)


def test_version_and_format_are_filled_in() -> None:
    written = EmbeddingsProvenance(encoder="e", data="d", num_examples=1, seed=0).to_json()
    assert (written["phatgoose"], written["format"]) == (phatgoose.__version__, 1)
