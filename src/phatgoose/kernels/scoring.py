"""Triton: scores of standardised activations, and the choice among them.

    score[n, e] = (v[e] . x[n] - sum(v[e]) mean(x[n])) rstd(x[n]) + bias[n, e]

v are prototypes that were standardised once and divided by sqrt(I), so x need
not be standardised: one product, and two sums per token from the same pass.
v has mean 0 up to rounding; sum(v) takes the rest out, so that the result is
v . (x - mean x) rstd whatever was rounded.

v is kept as hi + lo, two numbers of the activations' dtype, because a bf16 v
alone moves scores by 2**-9 of their spread and so changes choices. hi + lo has
16 bits (22 for fp16) at the bytes of one fp32 number. See docs/performance.md.

Layers that are called with one x (q, k and v; gate and up) share launches: up to three G, each with its own
prototypes. They share the sums of x.

Axes: G layers of one x, N tokens, E experts (padded, H x C), K chosen experts, I in-features, S splits of I.
`partial_scores` writes what each split found; `keys_of_one` adds the splits up in
order, so the same input gives the same bits. For many tokens `many_scores.py`
may have cuBLAS multiply: then `keys_of_one` adds hi and lo up, and rstd, which changes no order, comes from whoever
reads x next (`many_tokens.shrink_many`).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow(PDL: tl.constexpr):
    """Start before the kernel in front has ended, wait for its results, let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def of_layer(g, first, second, third, LAYERS: tl.constexpr):
    """The argument of layer g of up to three."""
    if LAYERS > 1:
        first = tl.where(g == 1, second, first)
    if LAYERS > 2:
        first = tl.where(g == 2, third, first)
    return first


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b. Triton's interpreter multiplies the bits of bf16 numbers, so there they are widened."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit(do_not_specialize=["num_tokens"])
def partial_scores(
    x_ptr,
    halves0_ptr,
    halves1_ptr,
    halves2_ptr,
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
    beyond the last expert mean nothing.
    """
    pid_n = tl.program_id(0)
    blocks_e = (tl.num_programs(1) - 1) // LAYERS
    pid_e = tl.program_id(1) % blocks_e
    g = tl.program_id(1) // blocks_e
    split = tl.program_id(2)
    hi_ptr = of_layer(g, halves0_ptr, halves1_ptr, halves2_ptr, LAYERS)
    lo_ptr = hi_ptr + stride_e.to(tl.int64) * in_features
    n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    e = pid_e * BLOCK_E + tl.arange(0, BLOCK_E)
    in_n = n < num_tokens
    slot = split.to(tl.int64) * num_tokens + n
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
        tl.store(stats_ptr + slot * 2, tl.sum(sum_NI, axis=1), mask=in_n)
        tl.store(stats_ptr + slot * 2 + 1, tl.sum(square_NI, axis=1), mask=in_n)
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

    at_N = slot + g.to(tl.int64) * tl.num_programs(2) * num_tokens
    tl.store(dots_ptr + at_N[:, None] * stride_e + e[None, :], dots_NE, mask=in_n[:, None] & (e < stride_e)[None, :])


@triton.jit
def keys(scores, in_e):
    """Integers in the order of scores, with room below -inf for "taken" and "no expert". NaN is the largest."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 and 0 tie
    bits = scores.to(tl.int32, bitcast=True)
    found = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    found = tl.where(scores != scores, 0x7FFFFFFF, found)
    return tl.where(in_e, found, -0x80000000)


@triton.jit
def score_of(key):
    """What `keys` made a key of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mean_and_rstd(total, square, in_features, eps):
    """Of one token, from the sum and the sum of squares of x."""
    mean = total / in_features
    variance = tl.maximum(square / in_features - mean * mean, 0.0)
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def read_sums(stats_ptr, token, num_tokens, SPLITS: tl.constexpr):
    """(sum, sum of squares) of one token's x, as `partial_scores` wrote them."""
    stats_S = stats_ptr + (token + tl.arange(0, SPLITS) * num_tokens) * 2
    return tl.sum(tl.load(stats_S), axis=0), tl.sum(tl.load(stats_S + 1), axis=0)


@triton.jit
def sums_of_row(x_ptr, in_features, BLOCK_I: tl.constexpr, STEPS: tl.constexpr):
    """(sum, sum of squares) of one token's x."""
    total, square = 0.0, 0.0
    for step in tl.static_range(STEPS):
        i = step * BLOCK_I + tl.arange(0, BLOCK_I)
        x_I = tl.load(x_ptr + i, mask=i < in_features, other=0.0).to(tl.float32)
        total += tl.sum(x_I, axis=0)
        square += tl.sum(x_I * x_I, axis=0)
    return total, square


@triton.jit
def keys_of_one(
    dots_ptr,
    sums_ptr,
    bias_ptr,
    token,
    mean,
    rstd,
    num_experts,
    stride_e,
    stride_n,
    stride_s,
    stride_bias,
    PARTS: tl.constexpr,
    E_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """keys_E of one token: PARTS of its scores are added up, stride_s apart."""
    e = tl.arange(0, E_PAD)
    in_e = e < num_experts
    dots_E = tl.zeros([E_PAD], tl.float32)
    for part in tl.static_range(PARTS):
        dots_E += tl.load(dots_ptr + token * stride_n + part * stride_s + e, mask=e < stride_e, other=0.0)
    scores_E = (dots_E - mean * tl.load(sums_ptr + e, mask=in_e, other=0.0)) * rstd
    if HAS_BIAS:
        scores_E += tl.load(bias_ptr + token * stride_bias + e, mask=in_e, other=0.0)
    return keys(scores_E, in_e)


@triton.jit
def choose(keys_E, num_experts, temperature, slot, E_PAD: tl.constexpr, TOP_K: tl.constexpr, WEIGHTS: tl.constexpr):
    """(weights, experts) of one token, for each number in `slot`; those from TOP_K on get the last slot's.

    The larger score wins, and of equal ones the lower expert id. NaN counts as the largest. A token whose scores are
    all -inf gets weights of 0. In scalars: an axis of one token would be carried through shared memory.
    Not WEIGHTS: scores in their place.
    """
    e = tl.arange(0, E_PAD)
    weights = tl.zeros(slot.shape, tl.float32)
    experts = tl.zeros(slot.shape, tl.int32)
    first, total = 0.0, 0.0
    for slot_k in tl.static_range(TOP_K):
        best = tl.max(keys_E, axis=0)
        expert = tl.minimum(tl.min(tl.where(keys_E == best, e, E_PAD), axis=0), num_experts - 1)
        keys_E = tl.where(e == expert, -0x80000000, keys_E)
        weight = score_of(best)
        if WEIGHTS:
            weight /= temperature
            if slot_k == 0:
                first = tl.where(weight == float("-inf"), 0.0, weight)
            weight = tl.exp(weight - first)
            total += weight
        weights = tl.where(slot >= slot_k, weight, weights)
        experts = tl.where(slot >= slot_k, expert, experts)
    if WEIGHTS:
        weights /= tl.where(total == 0.0, 1.0, total)
    return weights, experts


@triton.jit
def weights_of_slots(scores_MK, slot_M, k):
    """Of each row's slot, the weight among the scores of all, of which the first is the largest; as `choose` says."""
    first_M = tl.sum(tl.where(k[None, :] == 0, scores_MK, 0.0), axis=1)
    first_M = tl.where(first_M == float("-inf"), 0.0, first_M)
    weights_MK = tl.exp(scores_MK - first_M[:, None])
    total_M = tl.sum(weights_MK, axis=1)
    own_M = tl.sum(tl.where(k[None, :] == slot_M[:, None], weights_MK, 0.0), axis=1)
    return own_M / tl.where(total_M == 0.0, 1.0, total_M)
