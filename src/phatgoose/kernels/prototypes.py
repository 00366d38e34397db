"""Prototypes as the kernels read them.

Axes: G layers of one x, E experts, P experts padded, H halves, I in-features, V = G * H * P rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Prototypes(NamedTuple):
    """What standardised activations are multiplied with; the sum over H is the prototype.

    Attributes:
        halves_HPI: rounded to the activations' dtype, and (not in fp32) what that rounding left, rounded again.
            P is `rows_for(E)`. Of the rows beyond the last expert the first is 1 in the first half, so that products
            hold the sum of x too; the others are 0. Rows have no gaps, nor have halves.
        sums_E: the sums of the halves over I, fp32. Times mean(x) they are subtracted
            from the products, so that rounding does not give prototypes a mean.
    """

    halves_HPI: torch.Tensor
    sums_E: torch.Tensor


def split(prototypes_EI: torch.Tensor, dtype: torch.dtype) -> Prototypes:
    """fp32 prototypes as one number (fp32) or the sum of two (bf16: 16 bits, fp16: 22 bits) of a dtype."""
    num_experts, in_features = prototypes_EI.shape
    num_halves = 1 if dtype == torch.float32 else 2
    halves_HPI = prototypes_EI.new_zeros(num_halves, rows_for(num_experts), in_features, dtype=dtype)
    rest_EI = prototypes_EI
    for half_PI in halves_HPI:
        half_PI[:num_experts] = rest_EI.to(dtype)
        rest_EI = prototypes_EI - half_PI[:num_experts].float()
    halves_HPI[0, num_experts] = 1.0
    return Prototypes(halves_HPI, halves_HPI[:, :num_experts].double().sum(dim=(0, 2)).float())


def rows_for(num_experts: int) -> int:
    """P: of each expert, of ones, and what pads them."""
    return padded(num_experts + 1)


def padded(length: int) -> int:
    """A multiple of 16, so that rows of such a length are read 16 bytes at a time."""
    return -(-length // 16) * 16


def join(halves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The same numbers, so placed that `rows_of` copies none: halves_HPI of layers of one x, one after the other."""
    return list(torch.stack(list(halves)))


def rows_of(halves: Sequence[torch.Tensor]) -> torch.Tensor:
    """rows_VI: those of all halves_HPI, which are of one shape; without a copy where `join` placed them."""
    first, size = halves[0], halves[0].numel()
    begin, storage = first.storage_offset(), first.untyped_storage()._cdata
    in_a_row = all(
        half_HPI.is_contiguous()
        and half_HPI.untyped_storage()._cdata == storage
        and half_HPI.storage_offset() == begin + g * size
        for g, half_HPI in enumerate(halves)
    )
    in_features = first.shape[2]
    if in_a_row:
        return first.as_strided((len(halves) * size // in_features, in_features), (in_features, 1))
    return torch.cat([half_HPI.reshape(-1, in_features) for half_HPI in halves])
