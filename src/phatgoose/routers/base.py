"""What every router is: a rule at one site, and, for some, a reader of whole prompts.

Axes: N tokens, B prompts, S positions, E experts, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Protocol

import torch
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.experts.expert import Expert
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import Backend, Routing, mix_loras
from phatgoose.routers.record import RoutingRecord, ScoresRecord

Need = Literal["adapter", "gate", "activations", "embeddings"]


class PromptReader(Protocol):
    """What a router that reads prompts may ask of the model that is about to answer them."""

    @property
    def device(self) -> torch.device:
        """Where the model's inputs lie."""

    @property
    def num_experts(self) -> int:
        """E: places for experts, empty ones included."""

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the prompts are read by an encoder."""

    def texts(self, prompt_ids: Sequence[Sequence[int]]) -> list[str]:
        """Texts of prompts, from their token ids."""

    def mask_BE(self, num_prompts: int) -> torch.Tensor:
        """-inf for the experts that are masked for each of B prompts, 0 for the others; fp32 on the CPU."""

    def first_pass(
        self,
        prompt_ids: Sequence[Sequence[int]],
        records: Mapping[str, RoutingRecord | ScoresRecord],
        bias_BE: torch.Tensor | None = None,
    ) -> None:
        """Read the prompts once, as one batch padded on the right, and report the routing.

        Args:
            prompt_ids: token ids of B prompts, without padding.
            records: by site.
            bias_BE: added to the scores of each prompt's tokens; None for nothing.
        """

    def site_names(self) -> list[str]:
        """Names of the routed sites, in the order of the model."""


class PromptRouter(ABC):
    """The part of a router that reads whole prompts; see `Router.for_prompts`."""

    @abstractmethod
    def bias(
        self, model: PromptReader, prompt_ids: Sequence[Sequence[int]]
    ) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """What each prompt adds to the scores of all its tokens.

        Args:
            model: knows the prompts' texts and which experts are masked, and can read the prompts.
            prompt_ids: token ids of B prompts, without padding.

        Returns:
            bias_BE, fp32; -inf forbids an expert. One for all sites, or one for each site by name.
        """

    def put(self, slot: int, expert: Expert | None) -> None:  # noqa: B027  (most know nothing of single experts)
        """Replace the expert in a slot with another one, or with none."""


class Router(nn.Module, ABC):
    """The routing rule at one site: scores, then a softmax over the best `top_k`.

    A router is one file in this folder with a subclass of this class, and one line in
    `ROUTERS`. Whatever it knows of experts lies in buffers whose first axis is theirs
    (E, or a multiple of E), so that `put` can write the rows of one.

    Args:
        stack: the experts' weights at this site.
        config: top_k, eps, temperature and the options of single routers.

    Class attributes:
        needs: what every expert must bring along.
        fixed_top_k: whether the rule itself says how many experts a token gets, so that top_k does not count.
        reads_prompts: whether `for_prompts` makes something.
        standardises: whether `scores` are `prototypes_EI` times the activations standardised
            with `eps`, and `choose`, `weights` and `mix` are those of this class: then kernels
            compute all of it (`phatgoose.kernels.route_and_add_`).
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"adapter"})
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
        """The reader of whole prompts for all sites; None for a rule that sees tokens alone.

        Args:
            experts: by expert id; None for an empty slot.
            config: the same as the router's own.
        """
        return None

    @torch.no_grad()
    def put(self, slot: int, one: Router) -> None:
        """Write another expert in the place of the one in a slot; no tensor moves.

        Args:
            slot: the expert's id.
            one: the same rule for a stack of that expert alone, padded to the same rank, or of an empty slot.
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
            x_NI: activations that enter the site, any float dtype.
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
        """The scores that `choose` chooses from: `scores` and all that is added to them.

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
        """Turn scores (-inf: not to be chosen) into a routing: softmax over the best `top_k`.

        Args:
            scores_NE: final scores of all experts.
            mask_NE: the mask that is already part of them; see `forward`.
        """
        top_NK, expert_ids_NK = torch.topk(scores_NE, self.top_k, dim=-1)
        weights_NK = self.weights(top_NK / self.temperature)
        # only a mask, or emptied slots, can leave a token without any expert at all
        whole = mask_NE is None and not self.has_slots
        return Routing(weights_NK if whole else weights_NK.nan_to_num(0.0), expert_ids_NK)

    def weights(self, scores_NK: torch.Tensor) -> torch.Tensor:
        """Softmax of the chosen scores. A row without any usable expert gets weights of 0, or NaN."""
        return torch.softmax(scores_NK, dim=-1)

    def mix(
        self, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing, backend: Backend
    ) -> torch.Tensor:
        """The update of each token under its routing: the weighted sum of its experts' updates.

        Args:
            x_NI: activations, in the dtype of a_ERI.
            a_ERI, b_ERO: the experts' factors, LoRA's scale folded into b.
            routing: what `choose` chose.
            backend: how to compute it (`phatgoose.kernels.mix_loras`).

        Returns:
            y_NO, to be added to the base layer's output.
        """
        return mix_loras(x_NI, a_ERI, b_ERO, routing, backend=backend)
