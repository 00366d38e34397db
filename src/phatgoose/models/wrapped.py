"""What takes the place of a linear layer of the base model."""

from __future__ import annotations

from typing import Any

from torch import nn


class WrappedLinear(nn.Module):
    """A layer around a frozen linear layer.

    Models look at the weights of their linear layers (T5 reads wo.weight.dtype),
    so this has those of the layer inside.

    Args:
        base: the linear layer; any kind, quantised ones too.
    """

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    @property
    def weight(self) -> Any:
        """The base layer's weight."""
        return self.base.weight

    @property
    def bias(self) -> Any:
        """The base layer's bias; None if it has none."""
        return self.base.bias
