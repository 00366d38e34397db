"""Routers: rules by which each token chooses its experts at each site.

A router is one file in this folder with one class (see `Router`) and one line
in `ROUTERS`. Axes: N tokens, E experts, K chosen experts, I in-features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.errors import RouterError
from phatgoose.pool import Pool
from phatgoose.stack import SiteStack

Need = Literal["adapter", "gate"]

# name -> "module:class"; imported only when asked for
ROUTERS = {"phatgoose": "phatgoose.routers.phatgoose:Phatgoose"}


class Routing(NamedTuple):
    """What a router decided at one site.

    Attributes:
        weights_NK: fp32, each row sums to 1.
        expert_ids_NK: int64, distinct within a row, best first.
    """

    weights_NK: torch.Tensor
    expert_ids_NK: torch.Tensor


class Router(nn.Module, ABC):
    """The routing rule at one site: scores, then a softmax over the best `top_k`.

    Args:
        stack: the experts' weights at this site.
        config: top_k, eps, temperature.

    Class attributes:
        needs: what every expert must bring along.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"adapter"})
    absent_E: torch.Tensor

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__()
        self.top_k = config.top_k
        self.temperature = config.temperature
        # added to the scores: an expert that does not adapt this site is never chosen
        absent_E = torch.zeros(len(stack.present_E)).masked_fill(~stack.present_E.cpu(), float("-inf"))
        self.register_buffer("absent_E", absent_E, persistent=False)

    @abstractmethod
    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """Score every expert for every token.

        Args:
            x_NI: activations that enter the site, any float dtype.

        Returns:
            scores_NE, fp32; larger is better.
        """

    def forward(self, x_NI: torch.Tensor) -> Routing:
        """Choose `top_k` experts per token; weights are the softmax of their scores.

        Where fewer than `top_k` experts adapt this site, the rest of the row has weight 0.
        """
        scores_NE = self.scores(x_NI) + self.absent_E
        top_NK, expert_ids_NK = torch.topk(scores_NE, self.top_k, dim=-1)
        return Routing(torch.softmax(top_NK / self.temperature, dim=-1), expert_ids_NK)


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
        RouterError: unknown router, missing gates, or top_k larger than the pool.
        PoolError: the pool is empty.
    """
    found = router_class(config.router)
    experts = pool.experts()
    if config.top_k > len(experts):
        raise RouterError(
            f"top_k {config.top_k} is larger than pool {pool.folder}",
            found=f"{len(experts)} experts: {', '.join(pool.names)}",
            expected=f"top_k of at most {len(experts)}",
            fix=f"--top-k {len(experts)}",
        )
    gateless = [expert for expert in experts if not expert.has_gate]
    if "gate" in found.needs and gateless:
        raise RouterError(
            f"router {config.router!r} needs a gate, which these experts lack: "
            + ", ".join(expert.name for expert in gateless),
            found=f"{len(gateless)} of {len(experts)} experts without a gate",
            expected="gate.safetensors beside every adapter",
            fix=f"phatgoose gate {gateless[0].folder} --data DATA",
        )
    return found
