"""What one call of a model must read and multiply, and how fast that lets a routed model be beside its base.

Counted are weights: of the base layers that the call runs (of an embedding only the rows that are looked up), and at
every routed site its gates, as they are kept, and the factors of the experts that were chosen at least once.
Activations and key-value caches, which both sides have, are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.state import CallState
from phatgoose.routing.trace import SiteRecord

Call = Callable[[], Any]


@dataclass
class Work:
    """Of one call.

    Attributes:
        bytes: read from weights.
        flops: of products with them.
        sites: routed layers that ran.
        experts: chosen at least once, summed over the sites.
    """

    bytes: int = 0
    flops: int = 0
    sites: int = 0
    experts: int = 0


@torch.no_grad()
def base_work(model: nn.Module, call: Call) -> Work:
    """The work of a call of a model without experts; runs it once."""
    work, seen = Work(), set[int]()

    def count(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Embedding):
            work.bytes += inputs[0].numel() * module.embedding_dim * module.weight.element_size()
            return
        if isinstance(module, nn.Linear):
            work.flops += 2 * inputs[0].numel() * module.out_features
        if id(module) not in seen:
            seen.add(id(module))
            work.bytes += sum(p.nbytes for p in module.parameters(recurse=False))

    hooks = [module.register_forward_pre_hook(count) for module in model.modules()]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return work


@torch.no_grad()
def experts_work(model: nn.Module, call: Call) -> Work:
    """What the experts add to it; runs a call of the routed model once."""
    layers = [module for module in model.modules() if isinstance(module, RoutedLinear)]
    records = {layer.site: SiteRecord() for layer in layers}
    with layers[0].state.during(CallState(records=records)):
        call()
    work = Work()
    for layer in layers:
        routing = records[layer.site].routing()
        if routing is not None:
            _add_site(work, layer, routing.expert_ids_BSK)
    return work


def _add_site(work: Work, layer: RoutedLinear, ids_BSK: torch.Tensor) -> None:
    assert isinstance(layer.router, Phatgoose)
    gates = layer.gates_HPI[:, : len(layer.a_ERI)] if layer.group is not None else layer.router.prototypes_EI
    chosen = len(ids_BSK.unique())
    tokens, pairs = ids_BSK.shape[0] * ids_BSK.shape[1], ids_BSK.numel()
    work.sites += 1
    work.experts += chosen
    work.bytes += gates.nbytes + chosen * (layer.a_ERI[0].nbytes + layer.b_ERO[0].nbytes)
    work.flops += 2 * tokens * gates.numel()
    work.flops += 2 * pairs * (layer.a_ERI[0].numel() + layer.b_ERO[0].numel())
