"""Numbers of the official code (tests/golden), and the model that they belong to."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from phatgoose.models.base import load_base

GOLDEN = Path(__file__).parents[1] / "golden"
BASE = str(GOLDEN / "base")


@cache
def golden(name: str) -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def base() -> PreTrainedModel:
    return load_base(BASE, device="cpu")


def inputs() -> dict[str, torch.Tensor]:
    """What the official interface gives the model: no mask for the decoder."""
    return {name: golden("inputs")[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**inputs()).logits


def by_site(name: str, prefix: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(prefix): t for key, t in golden(name).items() if key.startswith(prefix)}
