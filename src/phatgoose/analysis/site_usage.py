"""Sums a site's routing while the model runs.

Axes: B rows, S positions, N = B * S tokens, E experts, K chosen experts, V
values (E weights and two entropies).
"""

from __future__ import annotations

import torch

from phatgoose.errors import BaseModelError
from phatgoose.kernels.types import Routing
from phatgoose.routers.record import ScoresRecord
from phatgoose.routing.linear import RoutedLinear


class TokenWeights:
    """Weight of each token of a batch in the averages: 1 / number of tokens in its row; 0 for padding."""

    def __init__(self) -> None:
        self._streams: dict[str, torch.Tensor] = {}
        self._moved: dict[tuple[str, torch.device], torch.Tensor] = {}

    def set(self, masks: dict[str, torch.Tensor]) -> None:
        """Start a batch.

        Args:
            masks: stream (see `Site.stream`) -> mask_BS: 1 for tokens, 0 for padding.
        """
        self._streams = {
            stream: (mask_BS / mask_BS.sum(dim=1, keepdim=True)).flatten() for stream, mask_BS in masks.items()
        }
        self._moved = {}

    def on(self, stream: str, device: torch.device) -> torch.Tensor:
        """weights_N (fp32) of a stream, on a device; moved there once per batch."""
        key = stream, device
        if key not in self._moved:
            self._moved[key] = self._streams[stream].to(device)
        return self._moved[key]


class SiteUsage(ScoresRecord):
    """Sums of one site's routing weights and entropies, weighted by token.

    The sums stay on the device, and the routing of single tokens is not kept.

    Args:
        site: name of the site.
        stream: the stream whose tokens it reads.
        linear: the routed layer.
        tokens: weights of the current batch's tokens.
        temperature: the router's temperature.
    """

    def __init__(self, site: str, stream: str, linear: RoutedLinear, tokens: TokenWeights, temperature: float) -> None:
        self.site = site
        self.stream = stream
        self.tokens = tokens
        self.temperature = temperature
        self.called = False
        self.sums_V = torch.zeros(len(linear.router.absent_E) + 2, device=linear.router.absent_E.device)

    def append_scores(self, scores_NE: torch.Tensor, routing: Routing, leading_shape: torch.Size) -> None:
        """See `ScoresRecord.append_scores`."""
        weights_N = self.tokens.on(self.stream, scores_NE.device)
        if len(weights_N) != len(scores_NE):
            raise BaseModelError(
                f"the routing of {self.site} cannot be averaged: it does not see each token of a batch exactly once",
                found=f"{len(scores_NE)} activations",
                expected=f"{len(weights_N)}, padding included",
                fix="analyse a pool whose experts do not adapt this layer",
            )
        # a token that may choose no expert has NaN here, and weights of 0
        probabilities_NE = torch.softmax(scores_NE / self.temperature, dim=-1).nan_to_num(0.0)
        # ids are distinct within a row, so that a scatter without reduction is exact and deterministic
        spread_NE = torch.zeros_like(scores_NE).scatter(1, routing.expert_ids_NK, routing.weights_NK)
        values_NV = torch.cat(
            [
                spread_NE,
                torch.special.entr(probabilities_NE).sum(dim=1, keepdim=True),
                torch.special.entr(routing.weights_NK).sum(dim=1, keepdim=True),
            ],
            dim=1,
        )
        self.sums_V += weights_N @ values_NV
        self.called = True
