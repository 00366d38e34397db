"""GLIDER's idea without its language model: each token's gate score, and how near its prompt is to each expert.

    score = v' . u' / sqrt(I) + global_scale * cos(e(prompt), e(expert))

Source: Li et al., "Glider: Global and Local Instruction-Driven Expert Router"
(arXiv 2410.07172). There, e embeds an instruction that a large model writes from
the query, or from three examples of an expert; here, e(prompt) embeds the prompt
and e(expert) is the mean of the expert's example embeddings. The authors' scale is 3 for
unseen tasks and 100 for held-in ones. Their softmax over all experts followed by
top-k is the same as the softmax over the top-k here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from phatgoose.config import RouterConfig
from phatgoose.embeddings import load_embeddings
from phatgoose.expert import Expert
from phatgoose.routers import PromptRouter
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.sentence_encoder import SentenceEncoder

if TYPE_CHECKING:
    from phatgoose.routed import RoutedModel


class Glider(Phatgoose):
    """PHATGOOSE's scores and a bias per prompt."""

    needs = frozenset({"adapter", "gate", "embeddings"})
    reads_prompts = True

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert], config: RouterConfig) -> PromptRouter:
        """See `Router.for_prompts`."""
        return Similarity(experts, config.global_scale)


class Similarity(PromptRouter):
    """Scaled cosine between a prompt and each expert's mean example."""

    def __init__(self, experts: Sequence[Expert], scale: float) -> None:
        self.encoder = SentenceEncoder()
        self.scale = scale
        means = [load_embeddings(expert.folder, self.encoder.name).mean(dim=0) for expert in experts]
        self.experts_ED = F.normalize(torch.stack(means), dim=1)

    def bias(self, model: RoutedModel, prompt_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptRouter.bias`."""
        return self.scale * (self.encoder.embed(model.texts(prompt_ids)) @ self.experts_ED.T)
