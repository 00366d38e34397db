"""Small pools: run every expert on every token and mask. Two plain products.

Extra memory: N * E * R numbers, and no more.
"""

from __future__ import annotations

import torch


def mix_loras(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    num_experts, rank, _ = a_ERI.shape
    h_NS = x_NI @ a_ERI.reshape(num_experts * rank, -1).T
    # scatter_add, because a router may name one expert twice
    weights_NE = weights_NK.new_zeros(x_NI.shape[0], num_experts).scatter_add(1, expert_ids_NK, weights_NK)
    h_NER = h_NS.view(-1, num_experts, rank) * weights_NE.to(h_NS.dtype).unsqueeze(2)
    return h_NER.view(-1, num_experts * rank) @ b_ERO.reshape(num_experts * rank, -1)
