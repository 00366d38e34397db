"""PHATGOOSE without standardisation: the logit that a gate was trained as.

    score = v . u

An ablation of ours. The paper standardises gates and activations because gates
of different contributors differ in norm (section 3.2), and shows no numbers.
"""

from __future__ import annotations

import torch

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.routers.base import Router


class PhatgooseRaw(Router):
    """Scores are gates times activations, both as they are."""

    needs = frozenset({"adapter", "gate"})
    gates_EI: torch.Tensor

    def __init__(self, stack: SiteStack, config: RouterConfig) -> None:
        super().__init__(stack, config)
        assert stack.gates_EI is not None
        self.register_buffer("gates_EI", stack.gates_EI.float(), persistent=False)

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        """See `Router.scores`."""
        return x_NI.float() @ self.gates_EI.T
