"""Prototypes as the Triton kernels read them.

Axes: E experts, I in-features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Prototypes(NamedTuple):
    """What standardised activations are multiplied with; hi + lo is the prototype.

    Attributes:
        hi_EI: rounded to the activations' dtype.
        lo_EI: what that rounding left, rounded again; None in fp32.
        sums_E: the sums of hi + lo over I, fp32. Times mean(x) they are subtracted
            from the products, so that rounding does not give prototypes a mean.
    """

    hi_EI: torch.Tensor
    lo_EI: torch.Tensor | None
    sums_E: torch.Tensor


def split(prototypes_EI: torch.Tensor, dtype: torch.dtype) -> Prototypes:
    """fp32 prototypes as one number (fp32) or the sum of two (bf16: 16 bits, fp16: 22 bits) of a dtype."""
    hi_EI = prototypes_EI.to(dtype)
    lo_EI = None if dtype == torch.float32 else (prototypes_EI - hi_EI.float()).to(dtype)
    exact_EI = hi_EI.double() if lo_EI is None else hi_EI.double() + lo_EI.double()
    return Prototypes(hi_EI.contiguous(), lo_EI, exact_EI.sum(dim=1).float())
