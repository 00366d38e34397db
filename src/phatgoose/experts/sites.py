"""Sites: the linear layers of a base model that adapters update."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from phatgoose.errors import BaseModelError
from phatgoose.experts.adapter import LoraShape
from phatgoose.experts.expert import Expert


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in-features, out-features) of a linear layer; None for any other module.

    Linear layers are torch's Linear and its subclasses (such as bitsandbytes' 4- and
    8-bit layers), GPT-2's Conv1D, and other quantised layers with attributes
    `in_features` and `out_features`.
    """
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    features = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(features[0], int) and isinstance(features[1], int):
        return features[0], features[1]
    return None


def find_linear(model: nn.Module, site: str, expert: str, shape: LoraShape) -> nn.Module:
    """The linear layer at a site of an expert.

    Args:
        model: the base model.
        site: name of the layer.
        expert: the expert's name, for messages.
        shape: the expert's shape at the site.

    Raises:
        BaseModelError: the model has no such module, or it is not a linear layer, or has another shape.
    """
    other_base = "open the base model that the expert was trained on, under the same Auto class"
    try:
        module = model.get_submodule(site)
    except AttributeError as error:
        raise BaseModelError(
            f"expert {expert!r} adapts {site}, which the base model does not have",
            found=type(model).__name__,
            expected=f"a model with a linear layer {site}",
            fix=other_base,
        ) from error
    actual = linear_shape(module)
    if actual is None:
        raise BaseModelError(
            f"expert {expert!r} adapts {site}, which is not a linear layer here",
            found=type(module).__name__,
            expected="a linear layer",
            fix=other_base,
        )
    if actual != (shape.in_features, shape.out_features):
        raise BaseModelError(
            f"expert {expert!r} does not fit the base model at {site}",
            found=f"base {actual[0]}->{actual[1]}",
            expected=f"expert {shape.in_features}->{shape.out_features}",
            fix=other_base,
        )
    return module


def check_sites(model: nn.Module, experts: Iterable[Expert]) -> None:
    """Raise BaseModelError unless every site of every expert is a linear layer of `model` with its shape."""
    for expert in experts:
        for site, shape in expert.shapes.items():
            find_linear(model, site, expert.name, shape)
