"""Standardised prototypes in the form that the kernels multiply.

Axes: G layers of one x, E experts, P experts padded, H numbers that are summed (hi, lo), I in-features, V = G * H * P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Prototypes(NamedTuple):
    """What standardised activations are multiplied with: a prototype is the sum over H.

    Attributes:
        gates_HPI: hi, the prototypes rounded to the activations' dtype; except in fp32 also lo, what that rounding
            left over, rounded again. P is `rows_for(E)`. The first row after the last expert is 1 in hi, so that
            products hold the sum of x too; the other rows of padding are 0. Contiguous.
        gate_sums_E: hi + lo summed over I, fp32. Times mean(x) they are subtracted from the products, so that rounding
            does not give prototypes a mean.
    """

    gates_HPI: torch.Tensor
    gate_sums_E: torch.Tensor


def split(prototypes_EI: torch.Tensor, dtype: torch.dtype) -> Prototypes:
    """fp32 prototypes as one number of `dtype` (fp32), or the sum of two (16 bits in bf16, 22 bits in fp16)."""
    num_experts, in_features = prototypes_EI.shape
    gates_HPI = prototypes_EI.new_zeros(
        1 if dtype == torch.float32 else 2, rows_for(num_experts), in_features, dtype=dtype
    )
    rest_EI = prototypes_EI
    for gates_PI in gates_HPI:
        gates_PI[:num_experts] = rest_EI.to(dtype)
        rest_EI = prototypes_EI - gates_PI[:num_experts].float()
    gates_HPI[0, num_experts] = 1.0
    return Prototypes(gates_HPI, gates_HPI[:, :num_experts].double().sum(dim=(0, 2)).float())


def rows_for(num_experts: int) -> int:
    """P: a row for each expert, one of ones, and padding."""
    return padded(num_experts + 1)


def padded(length: int) -> int:
    """The next multiple of 16: rows of such a length are read 16 bytes at a time."""
    return -(-length // 16) * 16


def join(gates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Same values as gates_HPI of layers of one x, contiguous, so `rows_of` returns a view."""
    return list(torch.stack(list(gates)))


def rows_of(gates: Sequence[torch.Tensor]) -> torch.Tensor:
    """gates_HPI of layers of one x, all of one shape, as rows_VI; a view if `join` placed them, else a copy."""
    first, size = gates[0], gates[0].numel()
    begin, storage = first.storage_offset(), first.untyped_storage()._cdata
    in_a_row = all(
        gates_HPI.is_contiguous()
        and gates_HPI.untyped_storage()._cdata == storage
        and gates_HPI.storage_offset() == begin + g * size
        for g, gates_HPI in enumerate(gates)
    )
    in_features = first.shape[2]
    if in_a_row:
        return first.as_strided((len(gates) * size // in_features, in_features), (in_features, 1))
    return torch.cat([gates_HPI.reshape(-1, in_features) for gates_HPI in gates])
