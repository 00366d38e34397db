"""Adapters, gates and pools of tiny models, made by PEFT and by the package."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from helpers.models import TARGETS, ModelFactory
from helpers.originals import originals
from phatgoose.experts.adapter import WEIGHTS_FILE, Adapter
from phatgoose.experts.pool import Pool
from phatgoose.experts.provenance import GateProvenance
from phatgoose.experts.vectors import save_gate
from phatgoose.files import sha256


def make_adapter(factory: ModelFactory, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """An adapter with random A and B, saved by PEFT itself."""

    def save(new: Path) -> None:
        model = factory()
        kind = model.config.model_type
        options = {
            "r": 8,
            "lora_alpha": 12,
            "target_modules": TARGETS[kind],
            "fan_in_fan_out": kind == "gpt2",
            "init_lora_weights": False,
            "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        }
        torch.manual_seed(seed)
        get_peft_model(model, LoraConfig(**(options | lora))).save_pretrained(str(new))

    originals().copy(("adapter", factory, seed, repr(lora)), save, folder)
    return folder


def make_gate(folder: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """A random gate beside an adapter."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = Adapter(folder).shapes
    vectors = {site: scale * torch.randn(shape.in_features, generator=generator) for site, shape in shapes.items()}
    save_gate(folder, vectors, provenance(folder))
    return folder


def provenance(folder: Path) -> GateProvenance:
    return GateProvenance(
        base="tiny",
        revision=None,
        data=None,
        adapter_sha256=sha256(folder / WEIGHTS_FILE),
        steps=0,
        learning_rate=5e-3,
        seed=0,
        settings={},
        phatgoose="test",
    )


def make_expert(factory: ModelFactory, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """An adapter with a gate."""
    return make_gate(make_adapter(factory, folder, seed, **lora), seed)


def fill_pool(folder: Path, base: str, experts: Sequence[Path]) -> Pool:
    pool = Pool.create(folder, base)
    for expert in experts:
        pool.add(expert)
    return pool


def make_pool(factory: ModelFactory, folder: Path, num_experts: int = 3, **lora: Any) -> Pool:
    """A pool in `folder`/pool of experts e0, e1, ... that lie beside it."""

    def make(new: Path) -> None:
        experts = [make_expert(factory, new / f"e{i}", seed=i, **lora) for i in range(num_experts)]
        fill_pool(new / "pool", factory().config._name_or_path, experts)

    originals().copy(("pool", factory, num_experts, repr(lora)), make, folder)
    return Pool.open(folder / "pool")
