"""Many tokens: sort the (token, expert) pairs by expert, then two grouped products.

No loop over experts, no copy of a number to the host. The K results of a token
are summed by a reshape, so the same input gives the same bits.
Extra memory: a few times N * K * (I + O) numbers. M below is N * K pairs.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

# grouped_mm wants every row to start at a multiple of 16 bytes
_ALIGNMENT = 16


def mix_loras(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    num_tokens, top_k = expert_ids_NK.shape
    out_features = b_ERO.shape[2]
    step = _ALIGNMENT // x_NI.element_size()
    x_NI, a_ERI = _pad(x_NI, step), _pad(a_ERI, step)
    b_ERO = _pad(b_ERO, step)
    if a_ERI.shape[1] % step:
        a_ERI, b_ERO = _pad(a_ERI, step, dim=1), _pad(b_ERO, step, dim=1)

    sorted_M, order_M = torch.sort(expert_ids_NK.reshape(-1), stable=True)
    experts_E = torch.arange(a_ERI.shape[0], device=x_NI.device)
    ends_E = torch.searchsorted(sorted_M, experts_E, right=True).to(torch.int32)
    h_MR = F.grouped_mm(x_NI.index_select(0, order_M // top_k), a_ERI.transpose(1, 2), offs=ends_E)
    h_MR = h_MR * weights_NK.reshape(-1)[order_M].to(h_MR.dtype).unsqueeze(1)
    y_MO = F.grouped_mm(h_MR, b_ERO, offs=ends_E)
    back_M = torch.empty_like(order_M).scatter_(0, order_M, torch.arange(order_M.numel(), device=x_NI.device))
    return y_MO.index_select(0, back_M).view(num_tokens, top_k, y_MO.shape[1]).sum(1)[:, :out_features]


def _pad(t: torch.Tensor, step: int, dim: int = -1) -> torch.Tensor:
    missing = -t.shape[dim] % step
    if missing == 0:
        return t
    return F.pad(t, (0, missing) if dim == -1 else (0, 0, 0, missing))
