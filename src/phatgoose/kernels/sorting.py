"""Triton: (token, slot) pairs in the order of their experts, by counting. No atomics, so always the same order.

1. `choose_many`: a program of one warp for each token, so that nothing waits for another warp; for all layers of x.
2. `place_pairs`: a program for each expert reads all ids. It counts those of lower experts, so it knows where its own
   pairs begin, and writes them: E * N * K small numbers are read, from the L2 cache, in place of a count for each block
   of tokens that would have to be waited for.

A pair is n * K + k. An expert's pairs lie together, those of slot 0 first. So `shrink_many` takes an expert's pairs as
one group, and `expand_many` the pairs of one slot, in which no token occurs twice.

Each group is cut into tiles of so many pairs. The group of expert e that begins at number b of its order has the tiles
from b // rows + e on: enough, for it needs (b + size) // rows - b // rows + 1 at most, and known without the sizes of
other groups' tiles. What a group does not need is empty.

Layers of one x share launches: axis 1 of the grid, up to three G.

Axes: G layers of one x, N tokens, E experts, K slots, M = N * K pairs, T tiles.
(`while`, because Triton's interpreter does not take a run-time bound in `range` under new numpys.)
"""

from __future__ import annotations

import triton
import triton.language as tl

from phatgoose.kernels.scoring import choose, keys_of_one, mean_and_rstd, of_layer, read_sums, sums_of_row


@triton.jit
def count_finite(bias_ptr, num_experts, E_PAD: tl.constexpr):
    """How many biases of a token are neither 0 nor -inf."""
    e = tl.arange(0, E_PAD)
    bias_E = tl.load(bias_ptr + e, mask=e < num_experts, other=0.0)
    return tl.sum(((bias_E != 0.0) & (bias_E != float("-inf"))).to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["num_tokens"])
def choose_many(
    x_ptr,
    dots_ptr,
    stats_ptr,
    means_ptr,
    sums0_ptr,
    sums1_ptr,
    sums2_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    weights_ptr,
    ids_ptr,
    ids_KN_ptr,
    num_tokens,
    num_experts,
    in_features,
    stride_x,
    stride_e,
    stride_n,
    stride_s,
    stride_g,
    stride_bias,
    stride_k,
    eps,
    temperature,
    LAYERS: tl.constexpr,
    PARTS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    E_PAD: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    LATE: tl.constexpr,
):
    """weights_GNK and expert_ids_GNK from parts of scores; the ids again as ids_GKN, of 4 bytes.

    The scores of a layer and a token are stride_g and stride_n apart; see `scoring.keys_of_one` for the rest.
    A row of ids_GKN has stride_k numbers, a multiple of 16; those beyond the last token mean nothing.

    Sums of x are read, or (SPLITS = 0) made here: x is then read once for all layers. LATE: what x is read by next
    makes them. The sum alone is a product with ones, behind the scores of the first layer. Scores are chosen by before
    rstd multiplies them, and written in place of weights; means_N2 says what is to be done: (the mean of x, 0). Only
    where a finite bias is added does the order depend on rstd; there rstd multiplies here, and means_N2 is (mean, 1).
    """
    token = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, K_PAD)
    total, square = 0.0, 0.0
    late = LATE
    if LATE and HAS_BIAS:
        finite = 0
        for g in tl.static_range(LAYERS):
            bias_ptr = of_layer(g, bias0_ptr, bias1_ptr, bias2_ptr, LAYERS)
            finite += count_finite(bias_ptr + token * stride_bias, num_experts, E_PAD)
        late = finite == 0
    if SPLITS > 0:
        total, square = read_sums(stats_ptr, token, num_tokens, SPLITS)
    elif late:
        total = tl.load(dots_ptr + token * stride_n + num_experts)
    else:
        total, square = sums_of_row(x_ptr + token * stride_x, in_features, BLOCK_I, STEPS)
    mean, rstd = mean_and_rstd(total, square, in_features, eps)
    if LATE:
        rstd = tl.where(late, 1.0, rstd)
        tl.store(means_ptr + 2 * token, mean)
        tl.store(means_ptr + 2 * token + 1, tl.where(late, 0.0, 1.0))
    for g in tl.static_range(LAYERS):
        keys_E = keys_of_one(
            dots_ptr + g * stride_g.to(tl.int64),
            of_layer(g, sums0_ptr, sums1_ptr, sums2_ptr, LAYERS),
            of_layer(g, bias0_ptr, bias1_ptr, bias2_ptr, LAYERS),
            token,
            mean,
            rstd,
            num_experts,
            stride_e,
            stride_n,
            stride_s,
            stride_bias,
            PARTS,
            E_PAD,
            HAS_BIAS,
        )
        weights_K, ids_K = choose(keys_E, num_experts, temperature, k, E_PAD, TOP_K, not LATE)
        at_K = (token + g * num_tokens.to(tl.int64)) * TOP_K + k
        tl.store(weights_ptr + at_K, weights_K, mask=k < TOP_K)
        tl.store(ids_ptr + at_K, ids_K.to(tl.int64), mask=k < TOP_K)
        tl.store(ids_KN_ptr + (g * TOP_K + k) * stride_k + token, ids_K, mask=k < TOP_K)


@triton.jit
def write_tiles(tiles_ptr, e, order, first, size, num_tiles, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Tiles of one group: rows of expert, first pair, and the pair where the group ends, in tiles_3T.

    Args:
        order: where the group begins among all groups that share tiles_3T.
        first: its first pair.
    """
    begin = order // ROWS + e
    end = (order + size) // ROWS + e + 1
    t = begin
    while t < end:
        tile = t + tl.arange(0, BLOCK_T)
        in_t = tile < end
        tl.store(tiles_ptr + tile, tl.zeros([BLOCK_T], tl.int32) + e, mask=in_t)
        tl.store(tiles_ptr + num_tiles + tile, first + (tile - begin) * ROWS, mask=in_t)
        tl.store(tiles_ptr + 2 * num_tiles + tile, tl.zeros([BLOCK_T], tl.int32) + first + size, mask=in_t)
        t += BLOCK_T


@triton.jit
def load_ids(ids_KN_ptr, k, n, num_tokens, stride_k, TOP_K: tl.constexpr):
    """ids_KN, beyond the last token none's; read 16 bytes at a time, for stride_k is a multiple of 16."""
    in_row = (k < TOP_K)[:, None] & (n < stride_k)[None, :]
    ids_KN = tl.load(ids_KN_ptr + k[:, None] * stride_k + n[None, :], mask=in_row, other=0)
    return tl.where((k < TOP_K)[:, None] & (n < num_tokens)[None, :], ids_KN, 0x7FFFFFFF)


@triton.jit
def counts_of(ids_KN, e):
    """How many are lower, and in the upper 32 bits how many are e: one sum for both, which waits for all threads."""
    return (ids_KN < e).to(tl.int64) + ((ids_KN == e).to(tl.int64) << 32)


@triton.jit
def write_pairs(pairs_ptr, ids_KN, e, k, n, next_K, TOP_K: tl.constexpr):
    """Those of expert e from place next_K on; how many."""
    hits_KN = (ids_KN == e).to(tl.int32)
    place_KN = next_K[:, None] + tl.cumsum(hits_KN, axis=1) - 1
    tl.store(pairs_ptr + place_KN, n[None, :] * TOP_K + k[:, None], mask=hits_KN != 0)
    return tl.sum(hits_KN, axis=1)


@triton.jit(do_not_specialize=["num_tokens", "steps", "shrink_tiles", "expand_tiles"])
def place_pairs(
    ids_KN_ptr,
    pairs_ptr,
    shrink_ptr,
    expand_ptr,
    num_tokens,
    stride_k,
    steps,
    shrink_tiles,
    expand_tiles,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SHRINK_ROWS: tl.constexpr,
    EXPAND_ROWS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    """pairs_GM of one expert; its tiles of all pairs (G, 3, T) and of each slot's (G, K, 3, T).

    AT_ONCE: in one step, so that ids are read once.
    """
    e = tl.program_id(0)
    g = tl.program_id(1).to(tl.int64)
    ids_KN_ptr += g * TOP_K * stride_k
    pairs_ptr += g * TOP_K * num_tokens
    shrink_ptr += g * 3 * shrink_tiles
    expand_ptr += g * TOP_K * 3 * expand_tiles
    k = tl.arange(0, K_PAD)
    local = tl.arange(0, BLOCK_N)

    ids_KN = load_ids(ids_KN_ptr, k, local, num_tokens, stride_k, TOP_K)
    counts_KN = counts_of(ids_KN, e)
    if not AT_ONCE:
        step = 1
        while step < steps:
            n = step * BLOCK_N + local
            counts_KN += counts_of(load_ids(ids_KN_ptr, k, n, num_tokens, stride_k, TOP_K), e)
            step += 1
    counts_K = tl.sum(counts_KN, axis=1)
    lower_K = (counts_K & 0xFFFFFFFF).to(tl.int32)
    own_K = (counts_K >> 32).to(tl.int32)
    begin = tl.sum(lower_K, axis=0)
    first_K = begin + tl.cumsum(own_K, axis=0) - own_K

    if AT_ONCE:
        write_pairs(pairs_ptr, ids_KN, e, k, local, first_K, TOP_K)
    else:
        next_K = first_K
        step = 0
        while step < steps:
            n = step * BLOCK_N + local
            ids_KN = load_ids(ids_KN_ptr, k, n, num_tokens, stride_k, TOP_K)
            next_K += write_pairs(pairs_ptr, ids_KN, e, k, n, next_K, TOP_K)
            step += 1

    write_tiles(shrink_ptr, e, begin, begin, tl.sum(own_K, axis=0), shrink_tiles, SHRINK_ROWS, BLOCK_T)
    for slot in tl.static_range(TOP_K):
        lower = tl.sum(tl.where(k == slot, lower_K, 0), axis=0)
        first = tl.sum(tl.where(k == slot, first_K, 0), axis=0)
        own = tl.sum(tl.where(k == slot, own_K, 0), axis=0)
        write_tiles(expand_ptr + slot * 3 * expand_tiles, e, lower, first, own, expand_tiles, EXPAND_ROWS, BLOCK_T)
