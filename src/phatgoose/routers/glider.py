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

import torch
from torch.nn import functional as F

from phatgoose.config import RouterConfig
from phatgoose.experts.expert import Expert
from phatgoose.routers.base import PromptReader, PromptRouter
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.retrieval import ExampleReader


class Glider(Phatgoose):
    """PHATGOOSE's scores and a bias per prompt."""

    needs = frozenset({"adapter", "gate", "embeddings"})
    reads_prompts = True

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert | None], config: RouterConfig) -> PromptRouter:
        """See `Router.for_prompts`."""
        return Similarity(experts, config.global_scale)


class Similarity(ExampleReader):
    """Scaled cosine between a prompt and each expert's mean example; 0 for an empty slot."""

    def __init__(self, experts: Sequence[Expert | None], scale: float) -> None:
        super().__init__(experts)
        self.scale = scale

    def bias(self, model: PromptReader, prompt_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptRouter.bias`."""
        prompts_BD = self.encoder.embed(model.texts(prompt_ids))
        nowhere_D = prompts_BD.new_zeros(prompts_BD.shape[1])
        means_ED = torch.stack([nowhere_D if mean_D is None else mean_D for mean_D in self.examples])
        return self.scale * (prompts_BD @ means_ED.T)

    def read(self, expert: Expert) -> torch.Tensor:
        """The mean of an expert's examples, (D,), of length 1."""
        return F.normalize(super().read(expert).mean(dim=0), dim=0)
