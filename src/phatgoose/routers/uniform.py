"""Uniform: every expert that adapts the site, with equal weights.

The plainest of baselines. `merged` differs where experts adapt different sites.
"""

from __future__ import annotations

import torch

from phatgoose.kernels.types import Routing
from phatgoose.routers.base import Router


class Uniform(Router):
    """Equal weights for all experts at a site."""

    fixed_top_k = True

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Zeros: all experts are equal."""
        return torch.zeros(len(x_NI), len(self.absent_E), device=x_NI.device)

    def choose(self, scores_NE: torch.Tensor, mask_NE: torch.Tensor | None = None) -> Routing:
        """See `Router.choose`."""
        usable_NE = (scores_NE > float("-inf")).float()
        weights_NE = usable_NE / usable_NE.sum(dim=-1, keepdim=True).clamp(min=1)
        return Routing(weights_NE, torch.arange(scores_NE.shape[1], device=scores_NE.device).expand_as(scores_NE))
