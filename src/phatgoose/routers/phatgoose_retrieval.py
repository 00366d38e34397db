"""PHATGOOSE with a prior from retrieval: how likely a prompt is among each expert's examples.

    density_e = mean over the expert's examples of exp(retrieval_scale * cos(e(prompt), e(example)))
    score_e = v_e' . u' / sqrt(I) + log density_e

Ours. Retrieval (paper section 4.2) gives a prompt to the owner of the nearest example, for better
or worse; here the same embeddings weigh the experts, and each token still chooses. With the scale 20,
with which the encoder was trained (sentence-transformers' contrastive loss takes the softmax of
20 cos), the sum is that loss's own estimate of how likely the prompt's neighbours are: where a prompt
lies among one expert's examples, the prior decides; where it is about as far from all of them, the
tokens do. GLIDER adds a cosine to one mean instead, with scales that differ between seen and unseen tasks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.expert import Expert
from phatgoose.routers.base import PromptReader, PromptRouter
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.retrieval import ExampleReader


class PhatgooseRetrieval(Phatgoose):
    """PHATGOOSE's scores and a prior per prompt."""

    needs = frozenset({"adapter", "gate", "embeddings"})
    reads_prompts = True

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert | None], config: RouterConfig) -> PromptRouter:
        """See `Router.for_prompts`."""
        return ExampleDensity(experts, config.retrieval_scale)


class ExampleDensity(ExampleReader):
    """Log density of a prompt among each expert's examples; 0 for an empty slot."""

    def __init__(self, experts: Sequence[Expert | None], scale: float) -> None:
        super().__init__(experts)
        self.scale = scale

    def bias(self, model: PromptReader, prompt_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptRouter.bias`."""
        return self.by_expert(model, prompt_ids, self._log_density, 0.0)

    def _log_density(self, cosines_BM: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(self.scale * cosines_BM, dim=1) - math.log(cosines_BM.shape[1])
