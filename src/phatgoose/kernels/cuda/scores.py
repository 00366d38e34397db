"""Triton: scores of standardised activations, bound by the bytes of the prototypes (few tokens) or by products (many).

    score[n, e] = (v[e] . x[n] - sum(v[e]) mean(x[n])) rstd(x[n]) + bias[n, e]

v are prototypes that were standardised once and divided by sqrt(I), so x need not be standardised: one product, and two
sums per token from the same pass. v has mean 0 up to rounding; sum(v) takes the rest out, so that the result is
v . (x - mean x) rstd whatever was rounded.

v is kept as hi + lo, two numbers of the activations' dtype, because a bf16 v alone moves scores by 2**-9 of their
spread and so changes choices. hi + lo has 16 bits (22 for fp16) at the bytes of one fp32 number. See
docs/kernels.md.

Each split of I writes its own part; `choice.keys_of_one` adds the parts up in order, so the same input gives the same
bits. With many experts and many tokens cuBLAS multiplies, whose tiles read less than Triton's: the parts are then hi
and lo, and rstd, which changes no order, comes from whoever reads x next (`many.shrink_many`).

Axes: G layers of one x, N tokens, E experts, P experts padded, H numbers that are summed (hi, lo), I in-features,
S splits of I, V = G * H * P rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phatgoose.kernels.cuda.launch import follow, launch_options, of_layer, product, steps_of, three
from phatgoose.kernels.cuda.settings import Many, Scores
from phatgoose.kernels.prototypes import rows_of
from phatgoose.kernels.types import Layer


@triton.jit(do_not_specialize=["num_tokens"])
def partial_scores(
    x_ptr,
    gates0_ptr,
    gates1_ptr,
    gates2_ptr,
    dots_ptr,
    stats_ptr,
    num_tokens,
    num_experts,
    in_features,
    stride_x,
    stride_e,
    LAYERS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_LO: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """dots_GSNE, or stats_SN2 (sum and sum of squares of x), of one split of I.

    BLOCK_N = 1 multiplies and adds; a larger one, a multiple of 16, uses matrix units. The sums have programs of their
    own, the last of axis 1: beside the products they would cost each step a reduction. And from 64 tokens on Hopper's
    matrix units still read x from shared memory when the next step begins; Triton (3.6) keeps one buffer too few of x
    if sums read it too, so that the step after next overwrites what the product with lo still reads
    (tests/kernels/test_cuda_compile.py counts the buffers).

    A row of dots_GSNE has stride_e numbers, a multiple of 16, so that it is written and read 16 bytes at a time; those
    past the last expert are undefined.
    """
    pid_n = tl.program_id(0)
    blocks_e = (tl.num_programs(1) - 1) // LAYERS
    pid_e = tl.program_id(1) % blocks_e
    g = tl.program_id(1) // blocks_e
    split = tl.program_id(2)
    hi_ptr = of_layer(g, gates0_ptr, gates1_ptr, gates2_ptr, LAYERS)
    lo_ptr = hi_ptr + stride_e.to(tl.int64) * in_features
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    in_n = n < num_tokens
    row_N = split.to(tl.int64) * num_tokens + n
    follow(PDL)

    if tl.program_id(1) == tl.num_programs(1) - 1:
        sum_NI = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
        square_NI = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
        for step in tl.range(0, STEPS):
            i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
            mask_NI = in_n[:, None] & (i < in_features)[None, :]
            x_NI = tl.load(x_ptr + n[:, None] * stride_x + i[None, :], mask=mask_NI, other=0.0).to(tl.float32)
            sum_NI += x_NI
            square_NI += x_NI * x_NI
        tl.store(stats_ptr + row_N * 2, tl.sum(sum_NI, axis=1), mask=in_n)
        tl.store(stats_ptr + row_N * 2 + 1, tl.sum(square_NI, axis=1), mask=in_n)
        return

    if BLOCK_N == 1:
        acc_EI = tl.zeros([BLOCK_E, BLOCK_I], tl.float32)
        in_e = e < num_experts
        e_row = e.to(tl.int64) * in_features
        # x once for each expert, from the L1 cache: read once, it would be carried through shared memory
        row_E1 = pid_n.to(tl.int64) * stride_x + tl.zeros([BLOCK_E, 1], tl.int32)
        for step in tl.range(0, STEPS):
            i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
            in_i = i < in_features
            in_ei = in_e[:, None] & in_i[None, :]
            x_EI = tl.load(x_ptr + row_E1 + i[None, :], mask=in_i[None, :], other=0.0).to(tl.float32)
            v_EI = tl.load(hi_ptr + e_row[:, None] + i[None, :], mask=in_ei, other=0.0).to(tl.float32)
            if HAS_LO:
                v_EI += tl.load(lo_ptr + e_row[:, None] + i[None, :], mask=in_ei, other=0.0).to(tl.float32)
            acc_EI += v_EI * x_EI
        dots_NE = tl.sum(acc_EI, axis=1)[None, :]
    else:
        # hi and lo as the rows of one operand: one product, which reads x from shared memory once
        HALVES: tl.constexpr = 2 if HAS_LO else 1
        v = tl.arange(0, HALVES * BLOCK_E)
        e_of_v = pid_e * BLOCK_E + v % BLOCK_E
        row_ptrs = tl.where(v < BLOCK_E, hi_ptr, lo_ptr) + e_of_v.to(tl.int64) * in_features
        in_v = e_of_v < num_experts
        dots_NV = tl.zeros([BLOCK_N, HALVES * BLOCK_E], tl.float32)
        for step in tl.range(0, STEPS):
            i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
            in_i = i < in_features
            x_NI = tl.load(x_ptr + n[:, None] * stride_x + i[None, :], mask=in_n[:, None] & in_i[None, :], other=0.0)
            v_VI = tl.load(row_ptrs[:, None] + i[None, :], mask=in_v[:, None] & in_i[None, :], other=0.0)
            dots_NV = product(x_NI, v_VI.T, dots_NV, UPCAST)
        dots_NE = tl.sum(dots_NV.reshape([BLOCK_N, HALVES, BLOCK_E]), axis=1)

    at_N = row_N + g.to(tl.int64) * tl.num_programs(2) * num_tokens
    tl.store(dots_ptr + at_N[:, None] * stride_e + e[None, :], dots_NE, mask=in_n[:, None] & (e < stride_e)[None, :])


def score(
    x_NI: torch.Tensor, layers: Sequence[Layer], settings: Scores, *, pdl: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dots_GSNE, with rows of `rows_for` numbers, and stats_SN2), fp32, for up to three layers."""
    (num_tokens, in_features), (num_summed, stride_e, _) = x_NI.shape, layers[0].gates_HPI.shape
    num_experts = len(layers[0].gate_sums_E)
    dots_GSNE = x_NI.new_empty(len(layers), settings.splits, num_tokens, stride_e, dtype=torch.float32)
    stats_SN2 = x_NI.new_empty(settings.splits, num_tokens, 2, dtype=torch.float32)
    grid = (
        triton.cdiv(num_tokens, settings.block_n),
        triton.cdiv(num_experts, settings.block_e) * len(layers) + 1,
        settings.splits,
    )
    partial_scores[grid](
        x_NI,
        *three([layer.gates_HPI for layer in layers]),
        dots_GSNE,
        stats_SN2,
        num_tokens,
        num_experts,
        in_features,
        x_NI.stride(0),
        stride_e,
        LAYERS=len(layers),
        BLOCK_N=settings.block_n,
        BLOCK_E=settings.block_e,
        BLOCK_I=settings.block_i,
        STEPS=steps_of(in_features, settings.block_i, settings.splits),
        HAS_LO=num_summed == 2,
        UPCAST=not x_NI.is_cuda,
        **launch_options(pdl and x_NI.is_cuda, settings.warps, settings.stages),
    )
    return dots_GSNE, stats_SN2


class Scored(NamedTuple):
    """The parts of many tokens' scores.

    Attributes:
        dots: fp32, products with prototypes.
        stats_SN2: sum and sum of squares of x. None if they are not known yet: the sum then lies in the column after
            the last expert, in the first part of the first layer.
        strides: elements between experts' rows of one part (its length); tokens; parts; layers.
        parts: how many add up to a score.
    """

    dots: torch.Tensor
    stats_SN2: torch.Tensor | None
    strides: tuple[int, int, int, int]
    parts: int


def score_many(x_NI: torch.Tensor, layers: Sequence[Layer], settings: Many) -> Scored:
    """By `partial_scores`, or by cuBLAS if the settings say so.

    fp32 always goes through Triton's kernel, because cuBLAS may be told to round it to TF32.
    """
    num_tokens, num_summed, row = len(x_NI), *layers[0].gates_HPI.shape[:2]
    if x_NI.dtype == torch.float32 or not settings.cublas:
        dots_GSNP, stats_SN2 = score(x_NI, layers, settings.scores, pdl=False)
        splits = settings.scores.splits
        return Scored(dots_GSNP, stats_SN2, (row, row, num_tokens * row, splits * num_tokens * row), splits)
    dots_NV = _product(x_NI, rows_of([layer.gates_HPI for layer in layers]))
    return Scored(dots_NV, None, (row, dots_NV.shape[1], row, num_summed * row), num_summed)


def _product(x_NI: torch.Tensor, rows_VI: torch.Tensor) -> torch.Tensor:
    """dots_NV in fp32."""
    if x_NI.is_cuda:
        return torch.mm(x_NI, rows_VI.T, out_dtype=torch.float32)
    return x_NI.float() @ rows_VI.float().T
