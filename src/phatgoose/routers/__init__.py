"""Routers: rules by which each token chooses its experts at each site.

A router is one file in this folder with one class (see `Router`) and one line
in `ROUTERS`. Axes: N tokens, E experts, K chosen experts, I in-features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.errors import RouterError
from phatgoose.expert import Expert
from phatgoose.pool import Pool
from phatgoose.stack import SiteStack

if TYPE_CHECKING:
    from phatgoose.routed import RoutedModel

Need = Literal["adapter", "gate", "activations", "embeddings"]
Mixing = Literal["outputs", "parameters"]

# name -> "module:class"; imported only when asked for
ROUTERS = {
    "phatgoose": "phatgoose.routers.phatgoose:Phatgoose",
    "phatgoose-prior": "phatgoose.routers.phatgoose_prior:PhatgoosePrior",
    "phatgoose-retrieval": "phatgoose.routers.phatgoose_retrieval:PhatgooseRetrieval",
    "phatgoose-raw": "phatgoose.routers.phatgoose_raw:PhatgooseRaw",
    "phatgoose-sequence": "phatgoose.routers.phatgoose_sequence:PhatgooseSequence",
    "average-activation": "phatgoose.routers.average_activation:AverageActivation",
    "arrow": "phatgoose.routers.arrow:Arrow",
    "arrow-peft": "phatgoose.routers.arrow:ArrowPeft",
    "spectr": "phatgoose.routers.spectr:Spectr",
    "lag": "phatgoose.routers.lag:Lag",
    "retrieval": "phatgoose.routers.retrieval:Retrieval",
    "glider": "phatgoose.routers.glider:Glider",
    "merged": "phatgoose.routers.merged:Merged",
    "merged-parameters": "phatgoose.routers.merged:MergedParameters",
    "uniform": "phatgoose.routers.uniform:Uniform",
    "single": "phatgoose.routers.single:Single",
}
# what an expert may have to bring along -> how people call it, and the command that makes it
NEEDS: dict[Need, tuple[str, str]] = {
    "gate": ("a gate", "phatgoose gate {folder} --data DATA"),
    "activations": ("mean activations", "phatgoose activations {folder} --data DATA"),
    "embeddings": ("embeddings of examples", "phatgoose embeddings {folder} --data DATA"),
}


class Routing(NamedTuple):
    """What a router decided at one site.

    Attributes:
        weights_NK: fp32; each row sums to 1 (`merged`: where all experts adapt the site).
        expert_ids_NK: int64, distinct within a row.
    """

    weights_NK: torch.Tensor
    expert_ids_NK: torch.Tensor


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
            what `phatgoose.kernels.routing_operators.route_and_add_` computes.
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


def router_class(name: str) -> type[Router]:
    """The router called `name`. Raises RouterError if there is none."""
    if name not in ROUTERS:
        raise RouterError(f"unknown router {name!r}", expected=", ".join(sorted(ROUTERS)))
    module, _, attribute = ROUTERS[name].partition(":")
    found: type[Router] = getattr(import_module(module), attribute)
    return found


def check_pool(pool: Pool, config: RouterConfig) -> type[Router]:
    """Check, before anything is loaded, that a router can route among a pool's experts.

    Returns:
        The router's class.

    Raises:
        RouterError: unknown router, an expert that lacks what the router needs,
            top_k larger than the pool, or an unknown or superfluous `expert`.
        PoolError: the pool is empty.
    """
    found = router_class(config.router)
    experts = pool.experts()
    if config.top_k > len(experts) and not found.fixed_top_k:
        raise RouterError(
            f"top_k {config.top_k} is larger than pool {pool.folder}",
            found=f"{len(experts)} experts: {', '.join(pool.names)}",
            expected=f"top_k of at most {len(experts)}",
            fix=f"--top-k {len(experts)}",
        )
    if (config.expert is not None) != (config.router == "single") or config.expert not in (None, *pool.names):
        raise RouterError(
            f"router {config.router!r} and expert {config.expert!r} do not go together",
            found=f"experts: {', '.join(pool.names)}",
            expected="router single with one of the pool's experts, or another router without --expert",
            fix=f"--router single --expert {pool.names[0]}",
        )
    check_needs(pool, config, experts)
    return found


def check_needs(pool: Pool, config: RouterConfig, experts: Sequence[Expert]) -> None:
    """Check that these experts of a pool bring along what the router needs. Raises RouterError."""
    for need in sorted(router_class(config.router).needs - {"adapter"}):
        lacking = [expert for expert in experts if not expert.brings(need)]
        if lacking:
            noun, command = NEEDS[need]
            entry = pool.entry(lacking[0].name)
            fix = command.format(folder=pool.folder / (entry.path or f"experts/{entry.name}"))
            if entry.path is None:  # its folder is the hub's cache, where nothing of ours should lie
                fix = f"phatgoose pool remove {pool.folder} {entry.name}, add it again without --link, then {fix}"
            raise RouterError(
                f"router {config.router!r} needs {noun}, which these experts lack: "
                + ", ".join(expert.name for expert in lacking),
                found=f"{len(lacking)} of {len(experts)} experts without",
                expected=f"{noun} beside every adapter",
                fix=fix,
            )
