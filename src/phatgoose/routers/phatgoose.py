"""PHATGOOSE: match each token with the experts' trained gates (paper section 3.2).

    v' = (v - mean v) / std v      once per expert and site
    u' = (u - mean u) / std u      per token
    score = v' . u' / sqrt(I)

Official code: LayerNorm without affine parameters on both (biased variance,
eps 1e-5), softmax over all experts, top-k, divided by (sum + 1e-6). The softmax
over the top-k here is the same up to that 1e-6.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.routers.base import Router


class Phatgoose(Router):
    """Scores are standardised gates times standardised activations, divided by sqrt(I)."""

    needs = frozenset({"adapter", "gate"})
    standardises = True
    prototypes_EI: torch.Tensor
    eps: float

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        vectors_EI = self.vectors(stack)
        self.eps = config.eps
        # 1/sqrt(I) is folded in
        prototypes_EI = standardise(vectors_EI, config.eps) / math.sqrt(vectors_EI.shape[1])
        self.register_buffer("prototypes_EI", prototypes_EI, persistent=False)

    def vectors(self, stack: SiteStack) -> torch.Tensor:
        """The vectors that tokens are matched with, (E, I), before they are standardised: the gates."""
        assert stack.gates_EI is not None
        return stack.gates_EI

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """See `Router.scores`."""
        x_NI = F.layer_norm(x_NI.float(), x_NI.shape[-1:], eps=self.eps)
        return x_NI @ self.prototypes_EI.T


def standardise(v_EI: torch.Tensor, eps: float) -> torch.Tensor:
    """Shift and scale rows to mean 0 and variance 1 (biased; eps is added to the variance).

    A constant row, such as an untrained gate of zeros, becomes zeros, also for eps = 0.
    """
    centred_EI = v_EI - v_EI.mean(dim=-1, keepdim=True)
    variance_E1 = centred_EI.square().mean(dim=-1, keepdim=True) + eps
    return torch.where(variance_E1 > 0, centred_EI * torch.rsqrt(variance_E1), 0.0)
