"""Which models need a mask."""

from __future__ import annotations

from helpers.models import MODELS
from phatgoose.training.group.model import needs_mask


def test_kinds_of_models() -> None:
    assert {kind: needs_mask(factory()) for kind, factory in MODELS.items()} == {
        "llama": False,
        "gpt2": False,
        "t5": True,
    }
