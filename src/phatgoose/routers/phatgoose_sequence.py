"""PHATGOOSE per sequence: at each site, all tokens of a sequence share the mean of its prompt's scores.

    score_e = mean over the prompt's tokens of v_e' . u' / sqrt(I), in a first pass with `phatgoose`

An ablation of ours: what per-token routing is worth. Experts still differ from
site to site. It costs a second pass over the prompt; answer tokens have the
prompt's scores. For decoder-only models: a decoder's sites see no token of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from phatgoose.config import RouterConfig
from phatgoose.data.encoder import pad
from phatgoose.errors import RouterError
from phatgoose.experts.expert import Expert
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels.types import Routing
from phatgoose.routers.base import PromptRouter, Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.record import ScoresRecord

if TYPE_CHECKING:
    from phatgoose.routing.model import RoutedModel


class PhatgooseSequence(Router):
    """Has no scores of its own; `MeanScores` gives each prompt's."""

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
        """All equal."""
        return torch.zeros(len(x_NI), len(self.absent_E), device=x_NI.device)


class MeanScores(PromptRouter):
    """Each prompt's mean scores at each site."""

    @torch.no_grad()
    def bias(self, model: RoutedModel, prompt_ids: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """See `PromptRouter.bias`.

        Raises:
            RouterError: the model is an encoder-decoder, or a site lies outside its blocks.
        """
        if model.config.is_encoder_decoder:
            raise RouterError(
                "router 'phatgoose-sequence' is for decoder-only models",
                found=type(model.model).__name__,
                fix="--router phatgoose",
            )
        mask_BS = pad([[1] * len(ids) for ids in prompt_ids], 0).to(model.device)
        inputs = {"input_ids": pad(prompt_ids, 0).to(model.device), "attention_mask": mask_BS}
        linears = model.routed_linears()
        before = {site: (linear.router, linear.record, linear.prompt_bias_BE) for site, linear in linears.items()}
        means = {site: SiteMean(mask_BS) for site in linears}
        try:
            for site, linear in linears.items():
                assert isinstance(linear.router, PhatgooseSequence)
                linear.router, linear.record, linear.prompt_bias_BE = linear.router.token_router, means[site], None
            model.model.base_model(**inputs, use_cache=False)
        finally:
            for site, linear in linears.items():
                linear.router, linear.record, linear.prompt_bias_BE = before[site]
        found = {site: mean.scores_BE for site, mean in means.items() if mean.scores_BE is not None}
        if len(found) < len(means):
            raise RouterError(
                "router 'phatgoose-sequence' needs sites that read each token of a prompt once",
                found=next(site for site in means if site not in found),
                fix="--router phatgoose",
            )
        return found


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
