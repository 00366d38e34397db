"""Pools whose experts bring along whatever any router needs, and models routed among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from helpers.data import model_inputs
from helpers.models import MODELS, make_tokenizer
from helpers.originals import originals
from helpers.pools import fill_pool, make_expert
from phatgoose.experts.adapter import WEIGHTS_FILE, Adapter
from phatgoose.experts.embeddings import ENCODER, save_embeddings
from phatgoose.experts.pool import Pool
from phatgoose.experts.provenance import ActivationsProvenance, EmbeddingsProvenance
from phatgoose.experts.vectors import ACTIVATIONS
from phatgoose.files import sha256
from phatgoose.routers import ROUTERS
from phatgoose.routing.model import RoutedModel


def complete(folder: Path, seed: int) -> Path:
    """Give an expert's folder whatever any router needs."""
    generator = torch.Generator().manual_seed(2000 + seed)
    shapes = Adapter(folder).shapes
    vectors = {site: torch.randn(shape.in_features, generator=generator) for site, shape in shapes.items()}
    provenance = ActivationsProvenance(
        base="tiny",
        revision=None,
        data="",
        adapter_sha256=sha256(folder / WEIGHTS_FILE),
        num_examples=1,
        settings={},
        phatgoose="test",
    )
    ACTIVATIONS.save(folder, vectors, provenance)
    embeddings_MD = F.normalize(torch.randn(5, 384, generator=generator), dim=1)
    save_embeddings(
        folder,
        embeddings_MD,
        EmbeddingsProvenance(encoder=ENCODER, data="", num_examples=5, seed=0, phatgoose="test"),
    )
    return folder


def make_pool(kind: str, folder: Path, num_experts: int = 4, **lora: Any) -> Pool:
    """As `helpers.pools.make_pool`, of experts that bring whatever any router needs."""
    factory = MODELS[kind]

    def make(new: Path) -> None:
        experts = [complete(make_expert(factory, new / f"e{i}", seed=i, **lora), seed=i) for i in range(num_experts)]
        fill_pool(new / "pool", factory().config._name_or_path, experts)

    originals().copy(("complete pool", kind, num_experts, repr(lora)), make, folder)
    return Pool.open(folder / "pool")


def routed(model: Any, pool: Pool, **options: Any) -> RoutedModel:
    return RoutedModel.from_pool(model, pool, tokenizer=make_tokenizer(), **options)


@torch.no_grad()
def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or model_inputs(model))).logits


# `single` routes among one expert, and has tests of its own
AMONG_MANY = [name for name in ROUTERS if name != "single"]
