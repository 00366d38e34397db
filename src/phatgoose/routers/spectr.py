"""SpectR: how much of a token lies in the subspace that each update reads.

    B A = U S V^T       score = || V^T u ||

Source: Fleshman and Van Durme, "SpectR: Dynamically Composing LM Experts with
Spectral Routing" (arXiv 2504.03454). The authors take the best 4 experts with
equal weights. Their code multiplies V^T with LoRA's scale, so that an expert of
larger alpha scores higher, and mixes parameters, `(sum w B')(sum w A') u` with
A' = V^T and B' = U S, which adds products between experts that depend on how
singular vectors happen to be paired; here outputs are mixed and the scale stays
out of the score.
"""

from __future__ import annotations

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.routers.base import Router
from phatgoose.routers.spectrum import spectrum


class Spectr(Router):
    """Norm of the projection on each expert's input subspace; equal weights."""

    subspaces_SI: torch.Tensor

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        right_ERI = spectrum(stack).right_ERI
        self.num_experts = len(right_ERI)
        self.register_buffer("subspaces_SI", right_ERI.flatten(0, 1), persistent=False)

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """See `Router.scores`."""
        projections_NS = x_NI.float() @ self.subspaces_SI.T
        return projections_NS.view(len(x_NI), self.num_experts, -1).norm(dim=2)

    def weights(self, scores_NK: torch.Tensor) -> torch.Tensor:
        """Equal weights for the chosen experts."""
        usable_NK = (scores_NK > float("-inf")).float()
        return usable_NK / usable_NK.sum(dim=-1, keepdim=True).clamp(min=1)
