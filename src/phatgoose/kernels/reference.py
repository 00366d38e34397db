"""The definition of `mix_loras`: a double loop over tokens and chosen experts. Slow; the oracle of the tests."""

from __future__ import annotations

import torch

from phatgoose.kernels.types import Routing


def mix_loras(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    rows = []
    for x_I, weights_K, expert_ids_K in zip(x_NI, *routing, strict=True):
        y_O = x_I.new_zeros(b_ERO.shape[2])
        for weight, e in zip(weights_K, expert_ids_K.tolist(), strict=True):
            h_R = a_ERI[e] @ x_I
            y_O = y_O + (h_R * weight.to(h_R.dtype)) @ b_ERO[e]
        rows.append(y_O)
    return torch.stack(rows) if rows else x_NI.new_zeros(0, b_ERO.shape[2])
