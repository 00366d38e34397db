"""What routing and the kernels pass to each other.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, G layers of one x; of prototypes
H numbers that are summed (hi, or hi and lo), P rows (E and padding).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Layer(NamedTuple):
    """The experts of one routed layer, as the kernels read them.

    Attributes:
        a_ERI: down-projections, in the dtype of the activations.
        b_ERO: up-projections in that dtype, with the scale folded in.
        gates_HPI: standardised prototypes, see `phatgoose.kernels.prototypes`.
        gate_sums_E: their sums over I, fp32.
        bias_NE: fp32, added to the scores; -inf forbids an expert. Shape (1, E) if it is the same for all tokens,
            None if nothing is added.
    """

    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    gates_HPI: torch.Tensor
    gate_sums_E: torch.Tensor
    bias_NE: torch.Tensor | None


class Rule(NamedTuple):
    """How scores become a routing: `softmax(top_k scores / temperature)` (PHATGOOSE, section 3.2).

    Attributes:
        top_k: experts per token.
        eps: added to the variance of the activations when they are standardised.
        temperature: divides the scores before the softmax.
    """

    top_k: int
    eps: float
    temperature: float


class Routing(NamedTuple):
    """The chosen experts of each token, and their weights. For layers of one x, both with an axis G in front.

    Attributes:
        weights_NK: fp32; each row sums to 1 (router `merged`: where all experts adapt the layer).
        expert_ids_NK: int64, distinct within a row.
    """

    weights_NK: torch.Tensor
    expert_ids_NK: torch.Tensor

    def layer(self, g: int) -> Routing:
        """The routing of layer g, where there is an axis G."""
        return Routing(self.weights_NK.select(0, g), self.expert_ids_NK.select(0, g))
