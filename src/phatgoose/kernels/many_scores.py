"""Scores of many tokens: by `partial_scores`, or with many experts by cuBLAS, whose tiles read less than Triton's.

Axes: G layers of one x, N tokens, P experts padded, H halves, I in-features, V = G * H * P rows, S splits of I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from phatgoose.kernels.launches import Question, score
from phatgoose.kernels.prototypes import rows_of
from phatgoose.kernels.settings import Many


class Scored(NamedTuple):
    """What a token's scores are made of.

    Attributes:
        dots: fp32, products with prototypes; `parts` of them are added up.
        stats_SN2: sum and sum of squares of x; None if they are not known yet. The sum then lies behind the dots of the
            first layer's first halves.
        strides: numbers of a row of one for each expert; from a token to the next; a part; a layer.
    """

    dots: torch.Tensor
    stats_SN2: torch.Tensor | None
    strides: tuple[int, int, int, int]
    parts: int


def score_many(x_NI: torch.Tensor, questions: Sequence[Question], settings: Many) -> Scored:
    """For the questions of up to three layers of one x.

    fp32 goes through Triton's kernel always, because cuBLAS may be told to round it to TF32.
    """
    num_tokens, num_halves, row = len(x_NI), *questions[0].halves_HPI.shape[:2]
    if x_NI.dtype == torch.float32 or not settings.cublas:
        dots_GSNP, stats_SN2 = score(x_NI, questions, settings.scores, False)
        splits = settings.scores.splits
        return Scored(dots_GSNP, stats_SN2, (row, row, num_tokens * row, splits * num_tokens * row), splits)
    dots_NV = _product(x_NI, rows_of([question.halves_HPI for question in questions]))
    return Scored(dots_NV, None, (row, dots_NV.shape[1], row, num_halves * row), num_halves)


def _product(x_NI: torch.Tensor, rows_VI: torch.Tensor) -> torch.Tensor:
    """dots_NV in fp32."""
    if x_NI.is_cuda:
        return torch.mm(x_NI, rows_VI.T, out_dtype=torch.float32)
    return x_NI.float() @ rows_VI.float().T
