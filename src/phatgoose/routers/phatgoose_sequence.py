"""PHATGOOSE per sequence: at each site, all tokens of a sequence share the mean of its prompt's scores.

    score_e = mean over the prompt's tokens of v_e' . u' / sqrt(I), in a first pass with `phatgoose`

An ablation of ours: what per-token routing is worth. Experts still differ from
site to site. It costs a second pass over the prompt; answer tokens have the
prompt's scores. For decoder-only models: a decoder's sites see no token of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phatgoose.config import RouterConfig
from phatgoose.data.encoder import pad
from phatgoose.errors import RouterError
from phatgoose.experts.expert import Expert
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels.types import Routing
from phatgoose.routers.base import PromptReader, PromptRouter, Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.record import ScoresRecord


class PhatgooseSequence(Router):
    """The mean scores of a token's prompt; while the prompt is read, the token's own."""

    needs = frozenset({"adapter", "gate"})
    reads_prompts = True

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        self.token_router = Phatgoose(stack, config)

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert | None], config: RouterConfig) -> PromptRouter:
        """See `Router.for_prompts`."""
        return MeanScores()

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """All equal: the prompt's mean is the bias."""
        return torch.zeros(len(x_NI), len(self.absent_E), device=x_NI.device)

    def final_scores(
        self, x_NI: torch.Tensor, bias_NE: torch.Tensor | None = None, mask_NE: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See `Router.final_scores`; without a bias (the first pass) each token's own scores."""
        if bias_NE is None:
            return self.token_router.final_scores(x_NI, None, mask_NE)
        return super().final_scores(x_NI, bias_NE, mask_NE)


class MeanScores(PromptRouter):
    """Each prompt's mean scores at each site."""

    def bias(self, model: PromptReader, prompt_ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """See `PromptRouter.bias`.

        Raises:
            RouterError: the model is an encoder-decoder, or a site lies outside its blocks.
        """
        if model.is_encoder_decoder:
            raise RouterError(
                "router 'phatgoose-sequence' is for decoder-only models",
                found="an encoder-decoder model",
                fix="--router phatgoose",
            )
        mask_BS = pad([[1] * len(ids) for ids in prompt_ids], 0)
        means = {site: SiteMean(mask_BS) for site in model.site_names()}
        model.first_pass(prompt_ids, means)
        scores = {site: mean.scores_BE for site, mean in means.items() if mean.scores_BE is not None}
        if len(scores) < len(means):
            raise RouterError(
                "router 'phatgoose-sequence' needs sites that read each token of a prompt once",
                found=next(site for site in means if site not in scores),
                fix="--router phatgoose",
            )
        return scores


class SiteMean(ScoresRecord):
    """Mean scores of each prompt's tokens at one site.

    Args:
        mask_BS: 1 for tokens, 0 for padding.

    Attributes:
        scores_BE: after the call; None before.
    """

    def __init__(self, mask_BS: torch.Tensor) -> None:
        self.mask_BS = mask_BS
        self.scores_BE: torch.Tensor | None = None

    def append_scores(self, scores_NE: torch.Tensor, routing: Routing, leading_shape: torch.Size) -> None:
        """See `ScoresRecord.append_scores`."""
        mask_BS1 = self.mask_BS.unsqueeze(2).to(scores_NE.device)
        scores_BSE = scores_NE.view(*self.mask_BS.shape, -1)
        # not a product: an expert that cannot be chosen has -inf
        self.scores_BE = scores_BSE.where(mask_BS1 == 1, 0.0).sum(dim=1) / mask_BS1.sum(dim=1)
