"""Triton: (token, slot) pairs in the order of their experts, by counting. No atomics, so always the same order.

A pair's bin is (expert, slot): an expert's pairs lie together, those of slot 0 first. So `shrink_many` takes an
expert's pairs as one group, and `expand_many` the pairs of one slot, in which no token occurs twice.

1. `count_pairs`: each program counts the bins of its block of tokens.
2. `place_pairs`: each program adds up all counts, so that it knows where its pairs begin in each bin, and writes them,
   as many tokens at once as fit (each step waits for all threads a few times).
   The first program also writes where bins begin and how many tiles each expert needs.

Layers of one x share launches: axis 1 of the grid, up to three G.

Axes: G layers of one x, N tokens, E experts, K slots, C blocks of tokens, M = N * K pairs.
(`while`, because Triton's interpreter does not take a run-time bound in `range` under new numpys.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from phatgoose.kernels.scoring import choose, follow, of_layer


@triton.jit
def add_counts(counts_KE, ids_N, in_n, slot: tl.constexpr, K_PAD: tl.constexpr, E_PAD: tl.constexpr):
    """counts_KE with the experts of one slot of a few tokens."""
    e = tl.arange(0, E_PAD)
    hits_NE = (ids_N[:, None] == e[None, :]) & in_n[:, None]
    count_E = tl.sum(hits_NE.to(tl.int32), axis=0)
    return counts_KE + tl.where(tl.arange(0, K_PAD)[:, None] == slot, count_E[None, :], 0)


@triton.jit
def count_block(
    ids_ptr,
    counts_ptr,
    num_tokens,
    stride_e,
    tokens_a_block,
    steps,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program's row of counts_CKE, of ids_NK; rows are padded to stride_e as those of the scores are."""
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, K_PAD)
    counts_KE = tl.zeros([K_PAD, E_PAD], tl.int32)
    step = 0
    while step < steps:
        of_block = step * BLOCK_N + tl.arange(0, BLOCK_N)
        n = tl.program_id(0) * tokens_a_block + of_block
        in_n = (of_block < tokens_a_block) & (n < num_tokens)
        for slot in tl.static_range(TOP_K):
            ids_N = tl.load(ids_ptr + n * TOP_K + slot, mask=in_n, other=0).to(tl.int32)
            counts_KE = add_counts(counts_KE, ids_N, in_n, slot, K_PAD, E_PAD)
        step += 1
    at_KE = (tl.program_id(0) * TOP_K + k[:, None]) * stride_e + e[None, :]
    tl.store(counts_ptr + at_KE, counts_KE, mask=(k < TOP_K)[:, None] & (e < stride_e)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "steps", "count_steps"])
def choose_many(
    dots_ptr,
    stats_ptr,
    sums0_ptr,
    sums1_ptr,
    sums2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    num_tokens,
    num_experts,
    in_features,
    stride_e,
    stride_bias,
    eps,
    temperature,
    steps,
    count_steps,
    LAYERS: tl.constexpr,
    SPLITS: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNT_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PDL: tl.constexpr,
):
    """weights_GNK and expert_ids_GNK from partial scores, and counts_GCKE of them."""
    g = tl.program_id(1).to(tl.int64)
    sums_ptr = of_layer(g, sums0_ptr, sums1_ptr, sums2_ptr, LAYERS)
    bias_ptr = of_layer(g, bias0_ptr, bias1_ptr, bias2_ptr, LAYERS)
    weights_ptr += g * num_tokens * TOP_K
    ids_ptr += g * num_tokens * TOP_K
    counts_ptr += g * tl.num_programs(0) * TOP_K * stride_e
    k = tl.arange(0, K_PAD)
    follow(PDL)
    step = 0
    while step < steps:
        n = ((tl.program_id(0) * steps + step) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
        weights_NK, ids_NK = choose(
            dots_ptr + g * SPLITS * num_tokens * stride_e,
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
            SPLITS,
            E_PAD,
            TOP_K,
            K_PAD,
            HAS_BIAS,
        )
        at_NK = n[:, None] * TOP_K + k[None, :]
        mask_NK = (n < num_tokens)[:, None] & (k < TOP_K)[None, :]
        tl.store(weights_ptr + at_NK, weights_NK, mask=mask_NK)
        tl.store(ids_ptr + at_NK, ids_NK.to(tl.int64), mask=mask_NK)
        step += 1
    # ids are read again, by other threads than those that wrote them, in the arrangement that counting wants
    tl.debug_barrier()
    tokens_a_block = steps * BLOCK_N
    count_block(ids_ptr, counts_ptr, num_tokens, stride_e, tokens_a_block, count_steps, E_PAD, TOP_K, K_PAD, COUNT_N)


@triton.jit(do_not_specialize=["num_tokens", "tokens_a_block", "count_steps"])
def count_pairs(
    ids_ptr,
    counts_ptr,
    num_tokens,
    stride_e,
    tokens_a_block,
    count_steps,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    COUNT_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """counts_CKE of expert ids that somebody else chose."""
    follow(PDL)
    count_block(ids_ptr, counts_ptr, num_tokens, stride_e, tokens_a_block, count_steps, E_PAD, TOP_K, K_PAD, COUNT_N)


@triton.jit(do_not_specialize=["num_tokens", "num_blocks", "tokens_a_block", "steps", "c_steps"])
def place_pairs(
    ids_ptr,
    weights_ptr,
    counts_ptr,
    tokens_ptr,
    sorted_weights_ptr,
    begins_ptr,
    shrink_ends_ptr,
    expand_ends_ptr,
    num_tokens,
    num_experts,
    stride_e,
    num_blocks,
    tokens_a_block,
    steps,
    c_steps,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SHRINK_ROWS: tl.constexpr,
    EXPAND_ROWS: tl.constexpr,
    ONE_STEP: tl.constexpr,
    PDL: tl.constexpr,
):
    """tokens_GM and sorted_weights_GM, sorted; begins of the bins (E * K + 1), ends of the tiles (E and K * E).

    A layer's row of begins has a multiple of 16 numbers.
    """
    block = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    num_pairs = num_tokens * TOP_K
    ids_ptr += g * num_pairs
    weights_ptr += g * num_pairs
    tokens_ptr += g * num_pairs
    sorted_weights_ptr += g * num_pairs
    counts_ptr += g * num_blocks * TOP_K * stride_e
    begins_ptr += g * (num_experts * TOP_K // 16 + 1) * 16
    shrink_ends_ptr += g * num_experts
    expand_ends_ptr += g * num_experts * TOP_K
    e = tl.arange(0, E_PAD)
    k = tl.arange(0, K_PAD)
    in_ke = (k < TOP_K)[:, None] & (e < num_experts)[None, :]
    # added up over C when all are read: a sum over C waits for the other threads
    total_CKE = tl.zeros([BLOCK_C, K_PAD, E_PAD], tl.int32)
    before_CKE = tl.zeros([BLOCK_C, K_PAD, E_PAD], tl.int32)
    follow(PDL)
    step = 0
    while step < c_steps:
        c = step * BLOCK_C + tl.arange(0, BLOCK_C)
        at_CKE = (c[:, None, None] * TOP_K + k[None, :, None]) * stride_e + e[None, None, :]
        mask_CKE = (c < num_blocks)[:, None, None] & (k < TOP_K)[None, :, None] & (e < stride_e)[None, None, :]
        counts_CKE = tl.load(counts_ptr + at_CKE, mask=mask_CKE, other=0)
        total_CKE += counts_CKE
        before_CKE += tl.where((c < block)[:, None, None], counts_CKE, 0)
        step += 1
    total_KE = tl.sum(total_CKE, axis=0)
    before_KE = tl.sum(before_CKE, axis=0)
    total_E = tl.sum(total_KE, axis=0)
    begin_KE = (tl.cumsum(total_E, axis=0) - total_E)[None, :] + tl.cumsum(total_KE, axis=0) - total_KE

    if block == 0:
        tl.store(begins_ptr + e[None, :] * TOP_K + k[:, None], begin_KE, mask=in_ke)
        tl.store(begins_ptr + num_experts * TOP_K, num_pairs)
        shrink_E = tl.cumsum((total_E + SHRINK_ROWS - 1) // SHRINK_ROWS, axis=0)
        tl.store(shrink_ends_ptr + e, shrink_E, mask=e < num_experts)
        expand_KE = tl.cumsum((total_KE + EXPAND_ROWS - 1) // EXPAND_ROWS, axis=1)
        tl.store(expand_ends_ptr + k[:, None] * num_experts + e[None, :], expand_KE, mask=in_ke)

    next_KE = begin_KE + before_KE
    local = tl.arange(0, BLOCK_N)
    step = 0
    while step < steps:
        of_block = step * BLOCK_N + local
        n = block * tokens_a_block + of_block
        in_n = (of_block < tokens_a_block) & (n < num_tokens)
        for slot in tl.static_range(TOP_K):
            ids_N = tl.load(ids_ptr + n * TOP_K + slot, mask=in_n, other=0).to(tl.int32)
            weights_N = tl.load(weights_ptr + n * TOP_K + slot, mask=in_n, other=0.0).to(tl.float32)
            earlier_NN = (ids_N[:, None] == ids_N[None, :]) & (local[None, :] < local[:, None]) & in_n[None, :]
            next_E = tl.sum(tl.where(k[:, None] == slot, next_KE, 0), axis=0)
            place_N = tl.gather(next_E, ids_N, axis=0) + tl.sum(earlier_NN.to(tl.int32), axis=1)
            tl.store(tokens_ptr + place_N, n, mask=in_n)
            tl.store(sorted_weights_ptr + place_N, weights_N, mask=in_n)
            if not ONE_STEP:
                next_KE = add_counts(next_KE, ids_N, in_n, slot, K_PAD, E_PAD)
        step += 1
