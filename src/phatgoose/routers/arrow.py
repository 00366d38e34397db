"""Arrow: match each token with the input direction that each update stretches most.

    v = top right singular vector of B A          once per expert and site
    score = |v . u|

Source: Ostapenko et al., "Towards Modular LLMs by Building and Reusing a Library
of LoRAs" (arXiv 2405.11157). Two forms are in use, neither of which normalises u:

- `arrow`, of the PHATGOOSE paper (section 4.2): the official code divides the
  score by sqrt(I) and by a temperature of 10, so that the two weights are nearly
  equal. Its score is of raw activations.
- `arrow-peft`: PEFT's ArrowConfig (and mttl) divide by a temperature of 1 only.
  PEFT finds v by power iteration from a random start, here it is exact.

The sign of v is arbitrary and does not matter.
"""

from __future__ import annotations

import math

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.routers.base import Router
from phatgoose.routers.spectrum import spectrum

OFFICIAL_TEMPERATURE = 10.0


class Arrow(Router):
    """Arrow as in the PHATGOOSE paper's code."""

    prototypes_EI: torch.Tensor

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        in_features = stack.a_ERI.shape[2]
        prototypes_EI = spectrum(stack).right_ERI[:, 0] * self._scale(in_features)
        self.register_buffer("prototypes_EI", prototypes_EI, persistent=False)

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """See `Router.scores`."""
        return (x_NI.float() @ self.prototypes_EI.T).abs()

    def _scale(self, in_features: int) -> float:
        return 1 / (OFFICIAL_TEMPERATURE * math.sqrt(in_features))


class ArrowPeft(Arrow):
    """Arrow as in PEFT: no sqrt(I), temperature 1."""

    def _scale(self, in_features: int) -> float:
        return 1.0
