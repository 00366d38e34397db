"""The spectrum of a LoRA update: right singular vectors and singular values of `B A`.

Axes: E experts, R rank, I in-features, O out-features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from phatgoose.experts.stack import SiteStack


class Spectrum(NamedTuple):
    """Singular values, largest first, and the input directions that they belong to.

    Attributes:
        values_ER: singular values, fp32.
        right_ERI: right singular vectors, fp32, orthonormal rows; zero where the singular value is
            (numerically) zero, as for padded ranks and absent experts.
    """

    values_ER: torch.Tensor
    right_ERI: torch.Tensor


def spectrum(stack: SiteStack) -> Spectrum:
    """Decompose every expert's update at a site without forming it.

    With `A^T = Q T` (QR), `B A = (B T^T) Q^T`, so the right singular vectors of
    `B A` are those of the small matrix `B T^T`, carried over by Q. Its squared
    form `T (B^T B) T^T` is R x R; fp64, because squaring halves the digits.
    """
    a_ERI, b_ERO = stack.a_ERI.double(), stack.b_ERO.double()
    q_EIR, t_ERR = torch.linalg.qr(a_ERI.transpose(1, 2))
    gram_ERR = t_ERR @ (b_ERO @ b_ERO.transpose(1, 2)) @ t_ERR.transpose(1, 2)
    squares_ER, vectors_ERR = torch.linalg.eigh(gram_ERR)
    squares_ER, vectors_ERR = squares_ER.flip(1), vectors_ERR.flip(2)
    right_ERI = vectors_ERR.transpose(1, 2) @ q_EIR.transpose(1, 2)
    tiny = torch.finfo(torch.float64).eps * squares_ER.shape[1] * squares_ER[:, :1]
    empty_ER = squares_ER <= tiny
    values_ER = squares_ER.clamp(min=0).sqrt().masked_fill(empty_ER, 0.0)
    return Spectrum(values_ER.float(), right_ERI.masked_fill(empty_ER.unsqueeze(2), 0.0).float())
