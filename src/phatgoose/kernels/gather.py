"""Few tokens: copy each token's factors side by side and multiply in batches.

Extra memory: N * K * R * (I + O) numbers.
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
    (num_tokens, top_k), rank = expert_ids_NK.shape, a_ERI.shape[1]
    ids_M = expert_ids_NK.reshape(-1)
    # the K experts of a token act as one LoRA of rank K * R
    a_NSI = a_ERI[ids_M].view(num_tokens, top_k * rank, a_ERI.shape[2])
    b_NSO = b_ERO[ids_M].view(num_tokens, top_k * rank, b_ERO.shape[2])
    h_NS = torch.bmm(a_NSI, x_NI.unsqueeze(2)).squeeze(2)
    h_NS = h_NS * weights_NK.to(h_NS.dtype).repeat_interleave(rank, dim=1)
    return torch.bmm(h_NS.unsqueeze(1), b_NSO).squeeze(1)
