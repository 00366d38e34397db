"""A trace: who carried each token, at each site.

Axes: B sequences, S positions, K chosen experts, E experts, N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from phatgoose.kernels.types import Routing


class SiteRouting(NamedTuple):
    """Recorded routing of one site: weights_BSK (fp32), expert_ids_BSK (int64)."""

    weights_BSK: torch.Tensor
    expert_ids_BSK: torch.Tensor


class SiteRecord:
    """Collects one site's routing, call by call."""

    def __init__(self) -> None:
        self._calls: list[SiteRouting] = []

    def append(self, routing: Routing, leading_shape: torch.Size) -> None:
        """See `RoutingRecord.append`."""
        shape = (1, 1) if len(leading_shape) == 0 else leading_shape if len(leading_shape) > 1 else (1, *leading_shape)
        weights, ids = (t.detach().view(*shape, -1).flatten(1, -2) for t in routing)
        self._calls.append(SiteRouting(weights, ids))

    def routing(self) -> SiteRouting | None:
        """All calls joined along the positions; None if there was no call."""
        if not self._calls:
            return None
        return SiteRouting(*(torch.cat(parts, dim=1).cpu() for parts in zip(*self._calls, strict=True)))


class Trace:
    """Routing recorded by `RoutedModel.trace()`.

    In a decoder-only model every site sees the positions of the text, one call
    after the other (prompt, then one new token a call). In an encoder-decoder
    model the sites of the encoder, and the keys and values of cross-attention,
    see the input's positions, the others the output's.

    Args:
        expert_names: names in the order of expert ids; "" for an empty slot.
        sites: names of the routed sites, in the order of the model.
    """

    def __init__(self, expert_names: Sequence[str], sites: Sequence[str]) -> None:
        self.expert_names = tuple(expert_names)
        self.records = {site: SiteRecord() for site in sites}

    @property
    def sites(self) -> list[str]:
        """Sites that were called at least once."""
        return [site for site, record in self.records.items() if record.routing() is not None]

    def routing(self, site: str) -> SiteRouting:
        """Routing of one site: weights_BSK, expert_ids_BSK. Raises KeyError if the site was never called."""
        routing = self.records[site].routing()
        if routing is None:
            raise KeyError(f"{site} was not called while this trace was recorded")
        return routing

    def weights(self, site: str) -> torch.Tensor:
        """weights_BSE: the routing weights of one site spread over all experts (0 where not chosen)."""
        weights_BSK, expert_ids_BSK = self.routing(site)
        return torch.zeros(*weights_BSK.shape[:2], len(self.expert_names)).scatter_add(2, expert_ids_BSK, weights_BSK)
