"""Triton kernels for few tokens: three launches, each bound by the bytes of what it reads.

1. `partial_scores`: every program reads some experts' prototypes and some features. Bytes: E * I * 4.
2. `shrink_few`: a program per token and split of I adds up the token's scores, chooses, and multiplies that
   split of x by the chosen A. Every split chooses again: E * S numbers are nothing, a launch is not.
   Bytes: N * K * R * I * 2.
3. `expand_few`: a program per token and block of O adds up the splits of h, multiplies by the chosen B, sums the
   K slots and adds them to y. Bytes: N * K * R * O * 2.

A static LoRA has three launches beside the base too (A, B, add). No atomics: every number has one writer.
Up to three layers G of one x have these launches in common.

Axes: G layers of one x, N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S splits of I.
"""

from __future__ import annotations

import triton
import triton.language as tl

from phatgoose.kernels.scoring import choose, follow, keys_of_one, mean_and_rstd, of_layer, read_sums


@triton.jit(do_not_specialize=["num_tokens"])
def shrink_few(
    x_ptr,
    dots_ptr,
    stats_ptr,
    sums0_ptr,
    sums1_ptr,
    sums2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    weights_ptr,
    ids_ptr,
    h_ptr,
    num_tokens,
    num_experts,
    in_features,
    rank,
    stride_x,
    stride_e,
    stride_bias,
    eps,
    temperature,
    LAYERS: tl.constexpr,
    SPLITS: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROUTE: tl.constexpr,
    PDL: tl.constexpr,
):
    """h_GSNKR: weight * (A x) of one split of I. ROUTE: choose first and write the choice; else read it."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    a_ptr = of_layer(g, a0_ptr, a1_ptr, a2_ptr, LAYERS)
    weights_ptr += g * num_tokens * TOP_K
    ids_ptr += g * num_tokens * TOP_K
    h_ptr += g * tl.num_programs(1) * num_tokens * TOP_K * rank
    # the rows of all chosen A, one below the other: one loop, and x is read once
    row = tl.arange(0, K_PAD * R_PAD)
    slot = row // R_PAD
    r = row % R_PAD
    in_row = (slot < TOP_K) & (r < rank)
    follow(PDL)
    if ROUTE:
        total, square = read_sums(stats_ptr, token, num_tokens, SPLITS)
        mean, rstd = mean_and_rstd(total, square, in_features, eps)
        keys_E = keys_of_one(
            dots_ptr + g * SPLITS * num_tokens * stride_e,
            of_layer(g, sums0_ptr, sums1_ptr, sums2_ptr, LAYERS),
            of_layer(g, bias0_ptr, bias1_ptr, bias2_ptr, LAYERS),
            token,
            mean,
            rstd,
            num_experts,
            stride_e,
            stride_e,
            num_tokens * stride_e,
            stride_bias,
            SPLITS,
            E_PAD,
            HAS_BIAS,
        )
        weight_KR, expert_KR = choose(keys_E, num_experts, temperature, slot, E_PAD, TOP_K, True)
        expert_KR = expert_KR.to(tl.int64)
        if split == 0:
            at_KR = token * TOP_K + slot
            tl.store(weights_ptr + at_KR, weight_KR, mask=in_row & (r == 0))
            tl.store(ids_ptr + at_KR, expert_KR, mask=in_row & (r == 0))
    else:
        weight_KR = tl.load(weights_ptr + token * TOP_K + slot, mask=in_row, other=0.0).to(tl.float32)
        expert_KR = tl.load(ids_ptr + token * TOP_K + slot, mask=in_row, other=0)
    a_row = (expert_KR * rank + r) * in_features
    acc_KRI = tl.zeros([K_PAD * R_PAD, BLOCK_I], tl.float32)
    for step in tl.range(0, STEPS):
        i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        in_i = i < in_features
        x_I = tl.load(x_ptr + token * stride_x + i, mask=in_i, other=0.0).to(tl.float32)
        a_KRI = tl.load(a_ptr + a_row[:, None] + i[None, :], mask=in_row[:, None] & in_i[None, :], other=0.0)
        acc_KRI += a_KRI.to(tl.float32) * x_I[None, :]
    h_KR = tl.sum(acc_KRI, axis=1) * weight_KR
    at_KR = ((split * num_tokens + token) * TOP_K + slot) * rank + r
    tl.store(h_ptr + at_KR, h_KR, mask=in_row)


@triton.jit(do_not_specialize=["num_tokens"])
def expand_few(
    y0_ptr,
    y1_ptr,
    y2_ptr,
    h_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    ids_ptr,
    num_tokens,
    out_features0,
    out_features1,
    out_features2,
    rank,
    stride_y0,
    stride_y1,
    stride_y2,
    LAYERS: tl.constexpr,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    R_PAD: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PDL: tl.constexpr,
):
    """y_NO += sum over the K slots of B h. Layers have O of their own; programs beyond a smaller one find nothing."""
    token = tl.program_id(0).to(tl.int64)
    g = tl.program_id(2).to(tl.int64)
    y_ptr = of_layer(g, y0_ptr, y1_ptr, y2_ptr, LAYERS)
    b_ptr = of_layer(g, b0_ptr, b1_ptr, b2_ptr, LAYERS)
    out_features = of_layer(g, out_features0, out_features1, out_features2, LAYERS)
    stride_y = of_layer(g, stride_y0, stride_y1, stride_y2, LAYERS)
    ids_ptr += g * num_tokens * TOP_K
    h_ptr += g * SPLITS * num_tokens * TOP_K * rank
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tl.arange(0, R_PAD)
    s = tl.arange(0, SPLITS)
    in_o = o < out_features
    in_r = r < rank
    follow(PDL)
    y_O = tl.load(y_ptr + token * stride_y + o, mask=in_o, other=0.0)
    update_O = tl.zeros([BLOCK_O], tl.float32)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + slot)
        b_row = (expert * rank + r) * out_features
        b_RO = tl.load(b_ptr + b_row[:, None] + o[None, :], mask=in_r[:, None] & in_o[None, :], other=0.0)
        # S x R, not R x S: else h would bring B into its own arrangement, through shared memory
        at_S = ((s * num_tokens + token) * TOP_K + slot) * rank
        h_R = tl.sum(tl.load(h_ptr + at_S[:, None] + r[None, :], mask=in_r[None, :], other=0.0), axis=0)
        update_O += tl.sum(h_R[:, None] * b_RO.to(tl.float32), axis=0)
    y_O = (y_O.to(tl.float32) + update_O).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * stride_y + o, y_O, mask=in_o)
