"""Block sizes, splits and warps of the Triton kernels, by shape.

Tables, no autotuning: that would time kernels (and so wait for the device) inside a forward, and two processes
could choose differently and give different bits. `benchmarks/routed_layer.py --sweep` measures alternatives.

Whatever depends on the number of tokens goes in powers of two, so that few variants are compiled.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

# programs that fill a GPU: the multiprocessors of an H100, H200
PROGRAMS = 132
# products of scores (tokens x experts x features) from which on cuBLAS is faster
LEAST_PRODUCTS_CUBLAS = 1 << 31
# cuBLAS makes no sums of x: largest x (elements) worth a second read (two thirds of an H100's L2 cache), and experts
# (x layers) from which on a second read is always worth it
MOST_NUMBERS_REREAD, LEAST_EXPERTS_REREAD = 1 << 24, 512
# few tokens: elements of A, and of B, that a warp holds in registers; long ranks and large K take smaller blocks
SHRINK_TILE, EXPAND_TILE = 2048, 4096


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Settings of `scores.partial_scores`. block_n is 1 or a multiple of 16."""

    block_n: int
    block_e: int
    block_i: int
    splits: int
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True, kw_only=True)
class Few:
    """Settings of the kernels for few tokens. `shrink_splits` is a power of two."""

    scores: Scores
    shrink_splits: int
    shrink_block_i: int
    expand_block_o: int
    shrink_warps: int = 4
    expand_warps: int = 4
    pdl: bool = False


@dataclass(frozen=True, kw_only=True)
class Many:
    """Settings of the kernels for many tokens.

    `shrink_rows` and `expand_rows` are sorted pairs per tile, at least 16. `expand_bytes` of y are updated for every k
    before the next columns are: what one k has written is then still in the L2 cache when the next one reads it. `pdl`
    is for B's launches, which follow each other. `cublas`: it multiplies prototypes in 16 bits, and does not make the
    sums of x.
    """

    scores: Scores
    cublas: bool = False
    place_block_n: int
    place_warps: int
    shrink_rows: int
    shrink_block_i: int
    shrink_splits: int
    expand_rows: int
    expand_block_o: int
    expand_bytes: int = 16 << 20
    shrink_warps: int = 4
    shrink_stages: int = 4
    expand_warps: int = 4
    pdl: bool = False

    @property
    def weigh_late(self) -> bool:
        """Whether A makes the sums of x that cuBLAS does not, and so the weights; else x is read once more.

        A's programs must see all of a token's x, and smaller tiles wait for their sums longer than reading takes.
        """
        return self.cublas and self.shrink_splits == 1 and self.shrink_rows == 64


@lru_cache(maxsize=1024)
def few(num_tokens: int, num_experts: int, in_features: int, layers: int = 1, *, pdl: bool = True) -> Few:
    """For a shape and a number of layers that share launches; `pdl` is for GPUs since Hopper."""
    if num_tokens <= 4:  # every token reads the prototypes again, from the L2 cache
        block_e, block_i = 8, 256
        programs = num_tokens * (layers * -(-num_experts // block_e) + 1)
        splits = _splits(programs, in_features, block_i, most=16)
        scores = Scores(block_n=1, block_e=block_e, block_i=block_i, splits=splits)
    else:
        block_n, block_e = (16, 16) if num_tokens <= 16 else (32, 32)
        programs = -(-num_tokens // block_n) * (layers * -(-num_experts // block_e) + 1)
        splits = _splits(programs, in_features, 128, most=16)
        scores = Scores(block_n=block_n, block_e=block_e, block_i=128, splits=splits)
    return Few(
        scores=scores,
        # a quarter: these programs are small, and several run on a multiprocessor
        shrink_splits=_splits(layers * num_tokens // 4, in_features, 256, most=16),
        shrink_block_i=256,
        # one warp: a thread then has all of R of its columns (or a quarter), and sums without the other warps
        expand_block_o=64 if num_tokens <= 4 else 256,
        expand_warps=1,
        pdl=pdl,
    )


@lru_cache(maxsize=1024)
def many(num_tokens: int, top_k: int, num_experts: int, in_features: int, layers: int = 1, *, pdl: bool = True) -> Many:
    """For a shape and a number of layers that share launches; `pdl` is for GPUs since Hopper."""
    shrink_rows = _rows(num_tokens * top_k / num_experts, most_from=40)
    tiles = num_tokens * top_k // shrink_rows + num_experts // 2
    # small tiles wait more than they load, so several should be at work on a multiprocessor
    shrink_splits = _splits(layers * tiles // (1 if shrink_rows == 64 else 2), in_features, 128, most=4)
    # what chooses adds a row's splits up
    most = 8 if num_experts <= 256 else 2
    programs = -(-num_tokens // 128) * (layers * -(-num_experts // 64) + 1)  # and those of the sums
    splits = _splits(programs, in_features, 64, most=most)
    while 2 * splits <= min(most, in_features // 64) and in_features // splits > 8192:
        splits *= 2
    chosen = Many(
        scores=Scores(block_n=128, block_e=64, block_i=64, splits=splits, warps=8),
        cublas=num_tokens * layers * num_experts * in_features >= LEAST_PRODUCTS_CUBLAS,
        # so many ids are in a program's registers, and are read once if they are all
        place_block_n=8192 // power_of_two(top_k),
        place_warps=8,
        shrink_rows=shrink_rows,
        # smaller steps where layers share launches: several programs fit on a multiprocessor
        shrink_block_i=64 if shrink_rows == 64 and layers > 1 else 128,
        shrink_stages=8 - layers if shrink_rows == 64 and layers > 1 else 4,
        shrink_splits=shrink_splits,
        expand_rows=_rows(num_tokens / num_experts, most_from=64),
        expand_block_o=128,
        # factors of many experts want room in the L2 cache too
        expand_bytes=(16 if num_experts <= 256 else 8) << 20,
        pdl=pdl,
    )
    rereads_x = chosen.cublas and not chosen.weigh_late and layers * num_experts < LEAST_EXPERTS_REREAD
    if rereads_x and num_tokens * in_features > MOST_NUMBERS_REREAD:
        return replace(chosen, cublas=False)
    return chosen


def power_of_two(number: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def _splits(programs: int, in_features: int, block_i: int, most: int) -> int:
    """Splits of I (a power of two) that make `programs` fill the GPU, each with a block or more."""
    splits = 1
    while splits < most and programs * splits < PROGRAMS and in_features >= 2 * splits * block_i:
        splits *= 2
    return splits


def _rows(mean_group: float, most_from: float) -> int:
    """Rows of a tile for groups of a mean size; 64 from some size on."""
    return 64 if mean_group >= most_from else 32 if mean_group >= 20 else 16
