"""Average Activation: match each token with the mean activation of each expert's examples.

    v = mean over 1,000 examples of the mean over their tokens of u
    scores as in `phatgoose`, with v in place of the gate

Source: paper section 4.2. The official code reads decoder activations from the
last step of a generation only; `phatgoose.training.mean_activations` takes all tokens
of prompt and target, and says how that differs.
"""

from __future__ import annotations

import torch

from phatgoose.experts.stack import SiteStack
from phatgoose.routers.phatgoose import Phatgoose


class AverageActivation(Phatgoose):
    """PHATGOOSE's scores with mean activations."""

    needs = frozenset({"adapter", "activations"})

    def vectors(self, stack: SiteStack) -> torch.Tensor:
        """The mean activations, (E, I)."""
        assert stack.activations_EI is not None
        return stack.activations_EI
