"""Sites: the linear layers of a base model that adapters change."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import BaseModelError
from phatgoose.experts.adapter import LoraShape
from phatgoose.experts.expert import Expert


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in-features, out-features) of a linear layer; None for any other module.

    Knows torch's Linear and its subclasses (bitsandbytes' 4- and 8-bit ones
    among them), GPT-2's Conv1D, and quantised layers that carry
    `in_features` and `out_features`.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    n, m = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(n, int) and isinstance(m, int):
        return n, m
    return None


def find_linear(model: nn.Module, site: str, expert: str, shape: LoraShape) -> nn.Module:
    """The linear layer of `model` that an expert's site names.

    Raises:
        BaseModelError: no such module, not a linear layer, or another shape.
    """
    wrong_base = "open the base model that the expert was trained on, under the same Auto class"
    try:
        module = model.get_submodule(site)
    except AttributeError as error:
        raise BaseModelError(
            f"expert {expert!r} adapts {site}, which the base model does not have",
            found=type(model).__name__,
            expected=f"a model with a linear layer {site}",
            fix=wrong_base,
        ) from error
    found = linear_shape(module)
    if found is None:
        raise BaseModelError(
            f"expert {expert!r} adapts {site}, which is no linear layer here",
            found=type(module).__name__,
            expected="a linear layer",
            fix=wrong_base,
        )
    if found != (shape.in_features, shape.out_features):
        raise BaseModelError(
            f"expert {expert!r} does not fit the base model at {site}",
            found=f"base {found[0]}->{found[1]}",
            expected=f"expert {shape.in_features}->{shape.out_features}",
            fix=wrong_base,
        )
    return module


def check_sites(model: nn.Module, experts: Iterable[Expert]) -> None:
    """Check that every site of every expert is a layer of `model`. Raises BaseModelError."""
    for expert in experts:
        for site, shape in expert.shapes.items():
            find_linear(model, site, expert.name, shape)
