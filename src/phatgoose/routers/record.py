"""What a routed layer reports its routing to.

Axes: N tokens, E experts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Protocol

import torch

from phatgoose.kernels.types import Routing


class RoutingRecord(Protocol):
    """What a site reports its routing to."""

    def append(self, routing: Routing, leading_shape: torch.Size) -> None:
        """Take one call's routing; `leading_shape` is the activation's shape without its last axis."""


class ScoresRecord(ABC):
    """A record that also wants the scores; the layer then takes its formula, since kernels keep no scores."""

    @abstractmethod
    def append_scores(self, scores_NE: torch.Tensor, routing: Routing, leading_shape: torch.Size) -> None:
        """Take one call.

        Args:
            scores_NE: final scores (`Router.final_scores`), fp32.
            routing: the router's choice from them.
            leading_shape: the activation's shape without its last axis.
        """
