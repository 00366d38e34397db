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
`partial_scores` writes what each split found; `choose` adds the splits up in
order, so the same input gives the same bits.
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
    hi0_ptr,
    hi1_ptr,
    hi2_ptr,
    lo0_ptr,
    lo1_ptr,
    lo2_ptr,
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
    (tests/test_triton_compile.py counts the buffers).

    A row of dots_GSNE has stride_e numbers, a multiple of 16, so that it is written and read 16 bytes at a time; those
    beyond the last expert mean nothing.
    """
    pid_n = tl.program_id(0)
    blocks_e = (tl.num_programs(1) - 1) // LAYERS
    pid_e = tl.program_id(1) % blocks_e
    g = tl.program_id(1) // blocks_e
    split = tl.program_id(2)
    hi_ptr = of_layer(g, hi0_ptr, hi1_ptr, hi2_ptr, LAYERS)
    lo_ptr = of_layer(g, lo0_ptr, lo1_ptr, lo2_ptr, LAYERS)
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
def keys_of_one(
    dots_ptr,
    stats_ptr,
    sums_ptr,
    bias_ptr,
    token,
    num_tokens,
    num_experts,
    in_features,
    stride_e,
    stride_bias,
    eps,
    SPLITS: tl.constexpr,
    E_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """keys_E of one token."""
    e = tl.arange(0, E_PAD)
    in_e = e < num_experts
    dots_E = tl.zeros([E_PAD], tl.float32)
    for split in tl.static_range(SPLITS):
        dots_E += tl.load(dots_ptr + (token + split * num_tokens) * stride_e + e, mask=e < stride_e, other=0.0)
    stats_S = stats_ptr + (token + tl.arange(0, SPLITS) * num_tokens) * 2
    mean = tl.sum(tl.load(stats_S), axis=0) / in_features
    variance = tl.maximum(tl.sum(tl.load(stats_S + 1), axis=0) / in_features - mean * mean, 0.0)
    scores_E = (dots_E - mean * tl.load(sums_ptr + e, mask=in_e, other=0.0)) * (1.0 / tl.sqrt(variance + eps))
    if HAS_BIAS:
        scores_E += tl.load(bias_ptr + token * stride_bias + e, mask=in_e, other=0.0)
    return keys(scores_E, in_e)


@triton.jit
def choose(
    dots_ptr,
    stats_ptr,
    sums_ptr,
    bias_ptr,
    n,
    num_tokens,
    num_experts,
    in_features,
    stride_e,
    stride_bias,
    eps,
    temperature,
    SPLITS: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """(weights_NK, ids_NK) of the tokens `n`, padded to K_PAD.

    The larger score wins, and of equal ones the lower expert id. NaN counts as
    the largest. A token whose scores are all -inf gets weights of 0.
    """
    # E as H x C: then, for as many tokens as warps, a warp has all of a token's C numbers and a thread those of all H,
    # so that no maximum waits for other warps
    C: tl.constexpr = E_PAD if E_PAD < 128 else 128
    in_n = n < num_tokens
    n_NHC = n[:, None, None]
    e_NHC = tl.arange(0, E_PAD // C)[None, :, None] * C + tl.arange(0, C)[None, None, :]
    in_e = e_NHC < num_experts
    dots_NHC = tl.zeros((n_NHC + e_NHC).shape, tl.float32)
    for split in tl.static_range(SPLITS):
        at_NHC = (n_NHC + split * num_tokens) * stride_e + e_NHC
        dots_NHC += tl.load(dots_ptr + at_NHC, mask=in_n[:, None, None] & (e_NHC < stride_e), other=0.0)
    stats_NS = stats_ptr + (n[:, None] + tl.arange(0, SPLITS)[None, :] * num_tokens) * 2
    sum_N = tl.sum(tl.load(stats_NS, mask=in_n[:, None], other=0.0), axis=1)
    square_N = tl.sum(tl.load(stats_NS + 1, mask=in_n[:, None], other=0.0), axis=1)
    mean_N = sum_N / in_features
    variance_N = tl.maximum(square_N / in_features - mean_N * mean_N, 0.0)
    rstd_N = 1.0 / tl.sqrt(variance_N + eps)
    sums_NHC = tl.load(sums_ptr + e_NHC, mask=in_e, other=0.0)
    scores_NHC = (dots_NHC - mean_N[:, None, None] * sums_NHC) * rstd_N[:, None, None]
    if HAS_BIAS:
        at_NHC = n_NHC * stride_bias + e_NHC
        scores_NHC += tl.load(bias_ptr + at_NHC, mask=in_n[:, None, None] & in_e, other=0.0)

    keys_NHC = keys(scores_NHC, in_e)
    k = tl.arange(0, K_PAD)
    top_NK = tl.full([n.shape[0], K_PAD], -0x80000000, tl.int32)
    ids_NK = tl.zeros([n.shape[0], K_PAD], tl.int32)
    for slot_k in tl.static_range(TOP_K):
        # two plain reductions: each is one instruction for a warp
        best_N = tl.max(tl.max(keys_NHC, axis=2), axis=1)
        ties_NHC = tl.where(keys_NHC == best_N[:, None, None], e_NHC, E_PAD)
        id_N = tl.minimum(tl.min(tl.min(ties_NHC, axis=2), axis=1), num_experts - 1)
        top_NK = tl.where(k[None, :] == slot_k, best_N[:, None], top_NK)
        ids_NK = tl.where(k[None, :] == slot_k, id_N[:, None], ids_NK)
        keys_NHC = tl.where(e_NHC == id_N[:, None, None], -0x80000000, keys_NHC)

    chosen_NK = score_of(top_NK) / temperature
    chosen_NK = tl.where(k[None, :] < TOP_K, chosen_NK, float("-inf"))
    best_N = tl.max(chosen_NK, axis=1)
    best_N = tl.where(best_N == float("-inf"), 0.0, best_N)
    exp_NK = tl.exp(chosen_NK - best_N[:, None])
    total_N = tl.sum(exp_NK, axis=1)
    return exp_NK / tl.where(total_N == 0.0, 1.0, total_N)[:, None], ids_NK
