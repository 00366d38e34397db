"""Surgery on a base model: layers of this package in place of its own, and its own back again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


class WrappedLinear(nn.Module):
    """A layer around a frozen linear layer; base class of whatever adds experts to it.

    Some models read the weight of their linear layers (T5 casts to `wo.weight.dtype`),
    so `weight` and `bias` are those of the layer inside.

    Args:
        base: the linear layer, of any class (quantised ones too).
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Any:
        """Weight of the base layer."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """Bias of the base layer; None if it has none."""
        return self.base.bias


def replace_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put `layers` into `model`; called again with what it returns, it puts the old ones back.

    Args:
        model: changed in place.
        layers: module name -> the module to put there.

    Returns:
        Module name -> the module that was there, last one first.

    Raises:
        AttributeError: `model` has no module of some name. Nothing has changed then.
    """
    before = {name: model.get_submodule(name) for name in reversed(list(layers))}
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return before


@contextmanager
def replaced_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """`replace_layers` for the `with` block: afterwards, also after an error, `model` is as it was."""
    before = replace_layers(model, layers)
    try:
        yield
    finally:
        replace_layers(model, before)
