"""What every router is.

Axes: N tokens, E experts, K chosen experts, I in-features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.experts.expert import Expert
from phatgoose.experts.stack import SiteStack

if TYPE_CHECKING:
    from phatgoose.routing.model import RoutedModel
from phatgoose.kernels.types import Routing

Need = Literal["adapter", "gate", "activations", "embeddings"]
Mixing = Literal["outputs", "parameters"]


class PromptRouter(ABC):
    """The part of a router that reads whole prompts; see `Router.for_prompts`."""

    @abstractmethod
    def bias(
        self, model: RoutedModel, prompt_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """What each prompt adds to the scores of all its tokens.

        Args:
            model: that is about to read the prompts; knows their texts and which experts are masked.
            prompt_ids: token ids of B prompts, without padding.

        Returns:
            bias_BE, fp32; -inf forbids an expert. The same at every site, or by site.
        """

    def put(self, slot: int, expert: Expert | None) -> None:  # noqa: B027  (most know nothing of single experts)
        """Take another expert, or none, in the place of the one in a slot."""


class Router(nn.Module, ABC):
    """The routing rule at one site: scores, then a softmax over the best `top_k`.

    Whatever it knows of experts lies in buffers whose first axis is theirs (E, or
    E times something), so that `put` can write the rows of one.

    Args:
        stack: the experts' weights at this site.
        config: top_k, eps, temperature and what single routers take.

    Class attributes:
        needs: what every expert must bring along.
        mixing: how the chosen experts act on a token. "outputs": the weighted
            sum of their updates. "parameters": the update of the weighted sums
            of their A and B (with cross terms between experts).
        fixed_top_k: whether the rule itself says how many experts a token
            gets, so that top_k does not count.
        reads_prompts: whether `for_prompts` makes something.
        standardises: whether `scores` are `prototypes_EI` times the activations
            standardised with `eps`, and `choose` and `weights` those of this class:
            what `phatgoose.kernels.route_and_add_` computes.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"adapter"})
    mixing: ClassVar[Mixing] = "outputs"
    fixed_top_k: ClassVar[bool] = False
    reads_prompts: ClassVar[bool] = False
    standardises: ClassVar[bool] = False
    absent_E: torch.Tensor

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.temperature = config.temperature
        self.has_slots = stack.filled_E is not None
        # added to the scores: an expert that does not adapt this site is never chosen
        absent_E = torch.zeros(len(stack.present_E), device="cpu").masked_fill(~stack.present_E.cpu(), float("-inf"))
        self.register_buffer("absent_E", absent_E, persistent=False)

    @classmethod
    def for_prompts(cls, experts: Sequence[Expert | None], config: RouterConfig) -> PromptRouter | None:
        """What reads whole prompts for all sites, if this rule does; None for token-level rules.

        Args:
            experts: by expert id; None for an empty slot.
            config: see the class.
        """
        return None

    @torch.no_grad()
    def put(self, slot: int, one: Router) -> None:
        """Write another expert in the place of the one in a slot; no tensor moves.

        Args:
            slot: its expert id.
            one: the same rule for a stack of that expert alone, with as large a rank, or of an empty slot.
        """
        for name, buffer in self.named_buffers():
            buffer.unflatten(0, (len(self.absent_E), -1))[slot].copy_(one.get_buffer(name))

    @abstractmethod
    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Score every expert for every token.

        Args:
            x_NI: activations that enter the site, any float dtype.

        Returns:
            scores_NE, fp32; larger is better.
        """

    def forward(
        self, x_NI: torch.Tensor, bias_NE: torch.Tensor | None = None, mask_NE: torch.Tensor | None = None
    ) -> Routing:
        """Choose experts for each token.

        Args:
            x_NI: see `scores`.
            bias_NE: added to the scores; what the tokens' prompts say.
            mask_NE: -inf for the experts that a token may not have, 0 for the
                others; shape (1, E) if it is the same for all.

        Returns:
            The routing. Where fewer experts can be chosen than the rule wants,
            the rest of the row has weight 0.
        """
        return self.choose(self.final_scores(x_NI, bias_NE, mask_NE), mask_NE)

    def final_scores(
        self, x_NI: torch.Tensor, bias_NE: torch.Tensor | None = None, mask_NE: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `choose` chooses from: `scores` with all that is added to them.

        Args:
            x_NI, bias_NE, mask_NE: see `forward`.

        Returns:
            scores_NE, fp32; -inf for experts that cannot be chosen.
        """
        scores_NE = self.scores(x_NI) + self.absent_E
        if bias_NE is not None:
            scores_NE = scores_NE + bias_NE
        if mask_NE is not None:
            scores_NE = scores_NE + mask_NE
        return scores_NE

    def choose(self, scores_NE: torch.Tensor, mask_NE: torch.Tensor | None = None) -> Routing:
        """Scores (-inf: not to be chosen) to routing: softmax over the best `top_k`.

        Args:
            scores_NE: of all experts.
            mask_NE: what of them is there because of a mask; see `forward`.
        """
        top_NK, expert_ids_NK = torch.topk(scores_NE, self.top_k, dim=-1)
        weights_NK = self.weights(top_NK / self.temperature)
        # only a mask, or emptied slots, can leave a token without any expert at all
        whole = mask_NE is None and not self.has_slots
        return Routing(weights_NK if whole else weights_NK.nan_to_num(0.0), expert_ids_NK)

    def weights(self, scores_NK: torch.Tensor) -> torch.Tensor:
        """Softmax of the chosen scores. A row without any usable expert gets weights of 0, or NaN."""
        return torch.softmax(scores_NK, dim=-1)
