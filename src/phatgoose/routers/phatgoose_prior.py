"""PHATGOOSE with a prior: what a prompt's tokens chose together counts for each of them.

    share_e = mean routing weight of expert e over the prompt's tokens and all sites, in a first pass with `phatgoose`
    score_e = v_e' . u' / sqrt(I) + prior_strength * log(share_e + 0.001)

Ours. PHATGOOSE decides every token at every site alone, without any notion of
the task at hand (a weakness that Glider, arXiv 2410.07172, names). Read the
softmax over gate scores as the probability that an expert explains a token; then
the shares are the first step of expectation maximisation for the proportions of
a mixture, and their logarithm is the prior of each token's choice. It needs
nothing but gates: no data, no encoder, no weight per task. A strength of 1 is that
prior; 2, the default, acts like more steps, and was chosen on the validation splits
of the demo pool's own datasets. It costs a second pass over the prompt; answer
tokens keep the prompt's prior. With `prior_steps`, further passes each route with
the prior of the one before, as further steps of expectation maximisation do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phatgoose.config import RouterConfig
from phatgoose.data.encoder import pad
from phatgoose.experts.expert import Expert
from phatgoose.kernels.types import Routing
from phatgoose.routers.base import PromptReader, PromptRouter
from phatgoose.routers.phatgoose import Phatgoose

# added to each share: an expert that no token chose loses prior_strength * 6.9
FLOOR = 1e-3


class PhatgoosePrior(Phatgoose):
    """PHATGOOSE's scores and a prior per prompt."""

    reads_prompts = True

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert | None], config: RouterConfig) -> PromptRouter:
        """See `Router.for_prompts`."""
        return UsagePrior(config.prior_strength, config.prior_steps)


class UsagePrior(PromptRouter):
    """A prior from usage: the scaled logarithm of each expert's share of a prompt.

    Args:
        strength: factor of the logarithm.
        steps: passes over the prompt.
    """

    def __init__(self, strength: float, steps: int = 1) -> None:
        self.strength = strength
        self.steps = steps

    def bias(self, model: PromptReader, prompt_ids: Sequence[Sequence[int]]) -> torch.Tensor:
        """See `PromptRouter.bias`."""
        bias_BE = torch.zeros(len(prompt_ids), model.num_experts, device=model.device)
        for _ in range(self.steps):
            bias_BE = self.strength * torch.log(self._shares(model, prompt_ids, bias_BE) + FLOOR)
        return bias_BE

    def _shares(self, model: PromptReader, prompt_ids: Sequence[Sequence[int]], bias_BE: torch.Tensor) -> torch.Tensor:
        """shares_BE: each expert's part of all routing weights of a prompt, in a pass with this bias."""
        mask_BS = pad([[1] * len(ids) for ids in prompt_ids], 0).to(model.device)
        usage = Usage(mask_BS, model.num_experts)
        model.first_pass(prompt_ids, dict.fromkeys(model.site_names(), usage), bias_BE)
        return usage.sums_BE / usage.sums_BE.sum(dim=1, keepdim=True).clamp(min=FLOOR)


class Usage:
    """Adds up routing weights per prompt and expert, over sites and unpadded tokens.

    Args:
        mask_BS: 1 for tokens, 0 for padding.
        num_experts: E.
    """

    def __init__(self, mask_BS: torch.Tensor, num_experts: int) -> None:
        self.mask_BS = mask_BS
        self.sums_BE = torch.zeros(len(mask_BS), num_experts, device=mask_BS.device)

    def append(self, routing: Routing, leading_shape: torch.Size) -> None:
        """Take one call's routing, as `SiteRecord.append` does."""
        weights_NK, expert_ids_NK = routing
        mask_N1 = self.mask_BS.reshape(-1, 1).to(weights_NK.device)
        rows_N1 = torch.arange(len(mask_N1), device=mask_N1.device).unsqueeze(1) // self.mask_BS.shape[1]
        cells_NK = rows_N1 * self.sums_BE.shape[1] + expert_ids_NK
        found = torch.zeros(self.sums_BE.numel(), device=weights_NK.device)
        found.scatter_add_(0, cells_NK.flatten(), (weights_NK * mask_N1).flatten())
        self.sums_BE += found.view_as(self.sums_BE).to(self.sums_BE.device)
