"""Triton: (token, k) pairs in the order of their experts, by counting. No atomics, so always the same order.

A pair is n * K + k. An expert's pairs lie together, those of k = 0 first. So `many.shrink_many` takes an expert's pairs
as one group, and `many.expand_many` the pairs of one k, in which no token occurs twice.

`place_pairs` has a program for each expert, which reads all ids. It counts those of lower experts, so it knows where
its own pairs begin, and writes them: E * N * K small numbers are read, from the L2 cache, in place of a count for each
block of tokens that would have to be waited for.

Each group is cut into tiles of so many pairs. The group of expert e that begins at number b of its order has the tiles
from b // rows + e on: enough, for it needs (b + size) // rows - b // rows + 1 at most, and known without the sizes of
other groups' tiles. What a group does not need is empty.

Layers of one x share launches: axis 1 of the grid, up to three G.

Axes: G layers of one x, N tokens, E experts, K chosen experts, M = N * K pairs, T tiles.
(`while`, because Triton's interpreter does not take a run-time bound in `range` under new numpys.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phatgoose.kernels.cuda.settings import Many, power_of_two
from phatgoose.kernels.prototypes import padded


@triton.jit
def write_tiles(tiles_ptr, e, order, first, size, num_tiles, ROWS: tl.constexpr, BLOCK_T: tl.constexpr):
    """Write the tiles of one group into tiles_3T: expert, first pair, and the pair where the group ends.

    Args:
        order: number of the group's first pair among all pairs that share tiles_3T.
        first: place of the group's first pair in pairs_M.
        size: pairs in the group.
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
    """ids_KN, past the last token no expert's; read 16 bytes at a time, because stride_k is a multiple of 16."""
    in_row = (k < TOP_K)[:, None] & (n < stride_k)[None, :]
    ids_KN = tl.load(ids_KN_ptr + k[:, None] * stride_k + n[None, :], mask=in_row, other=0)
    return tl.where((k < TOP_K)[:, None] & (n < num_tokens)[None, :], ids_KN, 0x7FFFFFFF)


@triton.jit
def counts_of(ids_KN, e):
    """Count of ids below e, and in the upper 32 bits of ids equal to e: one sum, so that threads wait only once."""
    return (ids_KN < e).to(tl.int64) + ((ids_KN == e).to(tl.int64) << 32)


@triton.jit
def write_pairs(pairs_ptr, ids_KN, e, k, n, next_K, TOP_K: tl.constexpr):
    """Write the pairs of expert e from place next_K on; returns how many there are for each k."""
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
    """pairs_GM of one expert; its tiles of all pairs (G, 3, T) and of each k's (G, K, 3, T).

    AT_ONCE: all tokens in one step, so that ids are read once.
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
    for j in tl.static_range(TOP_K):
        lower = tl.sum(tl.where(k == j, lower_K, 0), axis=0)
        first = tl.sum(tl.where(k == j, first_K, 0), axis=0)
        own = tl.sum(tl.where(k == j, own_K, 0), axis=0)
        write_tiles(expand_ptr + j * 3 * expand_tiles, e, lower, first, own, expand_tiles, EXPAND_ROWS, BLOCK_T)


class Sorted(NamedTuple):
    """Pairs in the order of their experts, and the tiles that they are cut into. All with an axis G in front."""

    pairs_M: torch.Tensor
    shrink_tiles_3T: torch.Tensor
    expand_tiles_K3T: torch.Tensor

    def layer(self, g: int) -> Sorted:
        """One layer's, of several."""
        return Sorted(*(tensor.select(0, g) for tensor in self))


def narrow_ids(expert_ids_GNK: torch.Tensor) -> torch.Tensor:
    """int32 ids_GKN, rows `padded` with anything."""
    layers, num_tokens, top_k = expert_ids_GNK.shape
    ids_GKN = expert_ids_GNK.new_empty(layers, top_k, padded(num_tokens), dtype=torch.int32)
    ids_GKN[:, :, :num_tokens] = expert_ids_GNK.transpose(1, 2)
    return ids_GKN


def sort_pairs(ids_GKN: torch.Tensor, num_tokens: int, num_experts: int, settings: Many) -> Sorted:
    """The pairs of a choice, given by `narrow_ids`."""
    layers, top_k, stride_k = ids_GKN.shape
    shrink_tiles = _most_tiles(num_tokens * top_k, num_experts, settings.shrink_rows)
    expand_tiles = _most_tiles(num_tokens, num_experts, settings.expand_rows)
    placed = Sorted(
        ids_GKN.new_empty(layers, num_tokens * top_k),
        ids_GKN.new_empty(layers, 3, shrink_tiles),
        ids_GKN.new_empty(layers, top_k, 3, expand_tiles),
    )
    block_n = min(settings.place_block_n, power_of_two(num_tokens))
    steps = triton.cdiv(num_tokens, block_n)
    place_pairs[(num_experts, layers)](
        ids_GKN,
        *placed,
        num_tokens,
        stride_k,
        steps,
        shrink_tiles,
        expand_tiles,
        TOP_K=top_k,
        K_PAD=power_of_two(top_k),
        BLOCK_N=block_n,
        BLOCK_T=32,
        SHRINK_ROWS=settings.shrink_rows,
        EXPAND_ROWS=settings.expand_rows,
        AT_ONCE=steps == 1,
        num_warps=settings.place_warps,
    )
    return placed


def _most_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """How many tiles `place_pairs` numbers."""
    return pairs // rows + num_experts
