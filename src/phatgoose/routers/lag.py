"""LAG: Arrow names candidates, SpectR picks one of them.

    candidates = the `filter_k` best by |v . u|      (Arrow)
    expert = argmax over candidates of || V^T u ||   (SpectR), with weight 1

Source: "LAG: LoRA-Augmented Generation" (arXiv 2507.05346), which keeps 20
candidates and splits its library into task and knowledge adapters; a pool is
one library here.
"""

from __future__ import annotations

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels.types import Routing
from phatgoose.routers.arrow import ArrowPeft
from phatgoose.routers.base import Router
from phatgoose.routers.spectr import Spectr


class Lag(Router):
    """One expert per token and site, by two scores."""

    fixed_top_k = True

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        self.arrow = ArrowPeft(stack, config)
        self.spectr = Spectr(stack, config)
        self.filter_k = min(config.filter_k, len(stack.present_E))

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Arrow's scores, which name the candidates."""
        return self.arrow.scores(x_NI)

    def final_scores(
        self, x_NI: torch.Tensor, bias_NE: torch.Tensor | None = None, mask_NE: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Router.final_scores`: SpectR's scores of the candidates, -inf for the others."""
        allowed_NE = self.absent_E if mask_NE is None else self.absent_E + mask_NE
        arrow_NE = self.scores(x_NI) + allowed_NE
        candidates_NK = torch.topk(arrow_NE, self.filter_k, dim=-1).indices
        filter_NE = torch.full_like(arrow_NE, -torch.inf).scatter(1, candidates_NK, 0.0)
        return self.spectr.scores(x_NI) + filter_NE + allowed_NE

    def choose(self, scores_NE: torch.Tensor, mask_NE: torch.Tensor | None = None) -> Routing:
        """See `Router.choose`: the best candidate alone."""
        best_N1, expert_ids_N1 = scores_NE.max(dim=-1, keepdim=True)
        return Routing((best_N1 > -torch.inf).float(), expert_ids_N1)
