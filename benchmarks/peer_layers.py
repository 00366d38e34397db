"""Layers of peers: one linear layer and its experts, as other code computes them.

Adapters have a scale of 1 and the dtype of the base layer (PEFT's own default would be fp32 adapters on a bf16
model, which is slower). A layer maps (..., I) to (..., O).

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from peft import ArrowConfig, LoraConfig, PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from peft.tuners.xlora.layer import XLoraLinearLayer
from torch import nn
from torch.nn import functional as F

from phatgoose.experts.stack import SiteStack
from phatgoose.routers.base import Router

Layer = Callable[[torch.Tensor], torch.Tensor]


def add(base: nn.Module, layer: Layer) -> Layer:
    """A base layer and an update."""
    return lambda x: base(x) + layer(x)


def static_lora(base: nn.Linear, a_RI: torch.Tensor, b_RO: torch.Tensor) -> Layer:
    """Three plain products and an add: the yardstick."""
    return lambda x: F.linear(x, base.weight) + F.linear(x, a_RI) @ b_RO


def with_adapters(base: nn.Linear, a_ERI: torch.Tensor, b_ERO: torch.Tensor) -> PeftModel:
    """A PEFT model of one linear layer, with adapters "0", "1", ..., all of them active."""
    config = LoraConfig(r=a_ERI.shape[1], lora_alpha=a_ERI.shape[1], target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(base), config, adapter_name="0", autocast_adapter_dtype=False)
    names = [str(e) for e in range(len(a_ERI))]
    for name in names[1:]:
        model.add_adapter(name, config, autocast_adapter_dtype=False)
    tuner: Any = model.base_model
    tuner.set_adapter(names)
    layer = only_layer(model)
    with torch.no_grad():
        for name, a_RI, b_RO in zip(names, a_ERI, b_ERO, strict=True):
            layer.lora_A[name].weight.copy_(a_RI)
            layer.lora_B[name].weight.copy_(b_RO.T)
    return model.eval()


def only_layer(model: PeftModel) -> Any:
    """PEFT's layer in a model of `with_adapters`, without what PEFT does once per model."""
    tuner: Any = model.base_model
    return tuner.model[0]


def x_lora(base: nn.Linear, a_ERI: torch.Tensor, b_ERO: torch.Tensor, scalings_NE: torch.Tensor, top_k: int) -> Layer:
    """PEFT's X-LoRA layer, given the scalings of N tokens; takes up to N.

    In X-LoRA a classifier makes them from another forward pass of the whole model, which is not counted here. The
    layer turns them into weights by a softmax over the best `top_k`.
    """
    model = with_adapters(base, a_ERI, b_ERO)
    adapters = {str(e): "" for e in range(len(a_ERI))}
    config = XLoraConfig(
        hidden_size=a_ERI.shape[2],
        adapters=adapters,
        enable_softmax=False,
        enable_softmax_topk=True,
        top_k_lora=top_k,
    )
    target = only_layer(model)
    whole: Any = SimpleNamespace(disabled=False)  # all that the layer asks of the model
    layer = XLoraLinearLayer(whole, target, target.forward, 0, config)
    scalings = scalings_NE.view(1, -1, 1, len(a_ERI))

    def forward(x: torch.Tensor) -> torch.Tensor:
        x_1NI = x.view(1, -1, x.shape[-1])
        return layer.forward(x_1NI, scalings=scalings[:, : x_1NI.shape[1]]).view(*x.shape[:-1], -1)

    return forward


def arrow(a_ERI: torch.Tensor, b_ERO: torch.Tensor, top_k: int) -> Layer:
    """PEFT's Arrow layer (it does not hold the base layer)."""
    config = ArrowConfig(top_k=top_k, rng_seed=0)
    config.task_adapter_names = [f"task_{e}" for e in range(len(a_ERI))]
    config.gks_adapter_names = []
    layer = ArrowLoraLinearLayer(a_ERI.shape[2], config)
    lora_a = {name: SimpleNamespace(weight=a) for name, a in zip(config.task_adapter_names, a_ERI, strict=True)}
    lora_b = {
        name: SimpleNamespace(weight=b.T.contiguous()) for name, b in zip(config.task_adapter_names, b_ERO, strict=True)
    }
    layer.build_prototypes(lora_a, lora_b)
    dropout, scaling = nn.Identity(), dict.fromkeys(lora_a, 1.0)
    return lambda x: layer(x, lora_a, lora_b, dropout, scaling)


def loop(base: nn.Module, stack: SiteStack, router: Router) -> Layer:
    """For each expert: find its tokens, two products, add."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        x_NI = x.view(-1, x.shape[-1])
        y_NO = base(x_NI)
        weights_NK, expert_ids_NK = router(x_NI)
        for e in range(len(stack.a_ERI)):
            tokens, slots = torch.nonzero(expert_ids_NK == e, as_tuple=True)
            h = (x_NI[tokens] @ stack.a_ERI[e].T) * weights_NK[tokens, slots].unsqueeze(1)
            y_NO.index_add_(0, tokens, h @ stack.b_ERO[e])
        return y_NO.view(*x.shape[:-1], -1)

    return forward


def split_loop(base: nn.Module, stack: SiteStack, router: Router) -> Layer:
    """The official code's steps: sort the pairs by expert, split, two products for each expert, add all at once.

    The official code also stacks the experts' factors in every call; that is left out.
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        x_NI = x.view(-1, x.shape[-1])
        y_NO = base(x_NI)
        weights_NK, expert_ids_NK = router(x_NI)
        weights_NE = weights_NK.new_zeros(len(x_NI), len(stack.a_ERI)).scatter_(1, expert_ids_NK, weights_NK)
        experts_P, tokens_P = torch.nonzero(weights_NE.T, as_tuple=True)
        parts = x_NI[tokens_P].split(torch.count_nonzero(weights_NE, dim=0).tolist())
        updates = [(part @ a.T) @ b for part, a, b in zip(parts, stack.a_ERI, stack.b_ERO, strict=True)]
        weights_P1 = weights_NE[tokens_P, experts_P].unsqueeze(1).to(y_NO.dtype)
        y_NO.index_add_(0, tokens_P, torch.cat(updates) * weights_P1)
        return y_NO.view(*x.shape[:-1], -1)

    return forward
