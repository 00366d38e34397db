"""Few tokens on a CPU: products of a matrix and a vector, with the factors read where they lie.

The routing is read on the host, which a GPU would have to be waited for. Nothing is gathered or
copied; y is added to in place. Where something wants a gradient, `reference` computes.
"""

from __future__ import annotations

import torch

from phatgoose.kernels import reference


def mix_loras(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x_NI, a_ERI, b_ERO, weights_NK)):
        return reference.mix_loras(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
    y_NO = x_NI.new_zeros(x_NI.shape[0], b_ERO.shape[2])
    for n, (weights_K, expert_ids_K) in enumerate(zip(weights_NK.tolist(), expert_ids_NK.tolist(), strict=True)):
        x_I, y_O = x_NI[n], y_NO[n]
        for weight, e in zip(weights_K, expert_ids_K, strict=True):
            y_O.addmv_(b_ERO[e].t(), torch.mv(a_ERI[e], x_I), alpha=weight)
    return y_NO
