"""One expert's LoRA at one site, as constants.

Axes: I in-features, O out-features, R rank.
"""

from __future__ import annotations

import torch
from torch import nn

from phatgoose.experts.adapter import LoraWeights


class FrozenLora(nn.Module):
    """The update `scaling * B A x` of a LoRA that is not trained.

    Args:
        weights: A, B and the scaling, which is folded into B (in fp32).
        device: where the weights lie.
        dtype: dtype of the weights and of the arithmetic.
    """

    a_RI: torch.Tensor
    b_OR: torch.Tensor

    def __init__(self, weights: LoraWeights, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("a_RI", weights.a_RI.to(device, dtype), persistent=False)
        self.register_buffer("b_OR", (weights.b_OR.float() * weights.scaling).to(device, dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> its update, shape (..., O), in the LoRA's dtype."""
        return nn.functional.linear(nn.functional.linear(x.to(self.a_RI.dtype), self.a_RI), self.b_OR)
