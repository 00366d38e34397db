"""Loops over tokens and experts, compiled by Numba and shared out among its threads. `cpu.py` calls them.

Every number has one writer, and sums have a fixed order, so the same input gives the same bits. Extra memory: N * E and
N * K * R numbers. M below is N * K (token, k) pairs, sorted by expert, then k, then token.

Axes: G layers of one x, N tokens, E experts, P experts padded, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numba
import numpy as np

Array: TypeAlias = np.ndarray[Any, Any]

# sums may be split over vector lanes; infinities and NaN keep their meaning
_FASTMATH = {"reassoc", "contract"}


@numba.njit(cache=True, fastmath=_FASTMATH)
def _mean_and_rstd(x_NI: Array, n: int, eps: float) -> tuple[Any, Any]:
    """Mean and 1 / standard deviation of row n. Rows are not sliced: threads would count references to one array."""
    in_features = x_NI.shape[1]
    total = np.float32(0)
    for i in range(in_features):
        total += x_NI[n, i]
    mean = np.float32(total / in_features)
    square = np.float32(0)
    for i in range(in_features):
        square += (x_NI[n, i] - mean) * (x_NI[n, i] - mean)
    return mean, np.float32(1 / math.sqrt(square / in_features + eps))


@numba.njit(cache=True)
def _is_larger(score: Any, other: Any) -> bool:
    return score > other or (math.isnan(score) and not math.isnan(other))


@numba.njit(cache=True)
def _insert(scores_K: Array, ids_K: Array, score: Any, e: Any) -> None:
    """Insert expert e behind those with as large a score; ids below e have been inserted already."""
    place = min(e, len(scores_K) - 1)
    while place > 0 and _is_larger(score, scores_K[place - 1]):
        scores_K[place] = scores_K[place - 1]
        ids_K[place] = ids_K[place - 1]
        place -= 1
    scores_K[place] = score
    ids_K[place] = e


@numba.njit(cache=True)
def _choose_one(
    dots_NP: Array,
    n: int,
    mean: Any,
    rstd: Any,
    sums_E: Array,
    bias_NE: Array,
    temperature: float,
    weights_NK: Array,
    ids_NK: Array,
    scores_K: Array,
    ids_K: Array,
) -> None:
    """Top-k of token n: write its rows of weights_NK and ids_NK, the largest first. scores_K and ids_K are scratch."""
    row = n % len(bias_NE)  # one row for all tokens, or a row each
    top_k = len(scores_K)
    for e in range(len(sums_E)):
        score = np.float32((dots_NP[n, e] - mean * sums_E[e]) * rstd + bias_NE[row, e])
        if e < top_k or _is_larger(score, scores_K[top_k - 1]):
            _insert(scores_K, ids_K, score, e)
    total = np.float32(0)
    for k in range(top_k):
        weights_NK[n, k] = math.exp((scores_K[k] - scores_K[0]) / temperature)
        ids_NK[n, k] = ids_K[k]
        total += weights_NK[n, k]
    for k in range(top_k):
        # the total is NaN where no expert was allowed
        weights_NK[n, k] = weights_NK[n, k] / total if total > 0 else 0


@numba.njit(cache=True, parallel=True)
def choose(
    dots_NP: Array,
    x_NI: Array,
    sums_E: Array,
    bias_NE: Array,
    top_k: int,
    eps: float,
    temperature: float,
    threads: int,
) -> tuple[Array, Array]:
    """(weights_NK, ids_NK) of many tokens; each thread takes a share of them."""
    num_tokens = len(dots_NP)
    weights_NK = np.empty((num_tokens, top_k), np.float32)
    ids_NK = np.empty((num_tokens, top_k), np.int64)
    for share in numba.prange(threads):
        thread = np.int64(share)
        scores_K, ids_K = np.empty(top_k, np.float32), np.empty(top_k, np.int64)
        for n in range(num_tokens * thread // threads, num_tokens * (thread + 1) // threads):
            mean, rstd = _mean_and_rstd(x_NI, n, eps)
            _choose_one(
                dots_NP, n, mean, rstd, sums_E, bias_NE, temperature, weights_NK, ids_NK, scores_K, ids_K
            )  # fmt: skip
    return weights_NK, ids_NK


@numba.njit(cache=True, parallel=True, fastmath=_FASTMATH)
def _dots(prototypes: tuple[Array, ...], x_I: Array, num_experts: int, threads: int) -> Array:
    """dots_GE of one token; each thread takes a share of every layer's experts, so that a layer is looked up once."""
    dots_GE = np.empty((len(prototypes), num_experts), np.float32)
    for thread in numba.prange(threads):
        for g in range(len(prototypes)):
            prototypes_PI = prototypes[g]
            for e in range(num_experts * thread // threads, num_experts * (thread + 1) // threads):
                total = np.float32(0)
                for i in range(len(x_I)):
                    total += prototypes_PI[e, i] * x_I[i]
                dots_GE[g, e] = total
    return dots_GE


@numba.njit(cache=True, parallel=True, fastmath=_FASTMATH)
def _add_ones(
    ys: tuple[Array, ...],
    x_I: Array,
    downs: tuple[Array, ...],
    ups: tuple[Array, ...],
    weights_GNK: Array,
    ids_GNK: Array,
) -> None:
    """Add the updates of one token; a thread for each layer."""
    for g in numba.prange(len(ys)):
        y_NO, a_ERI, b_ERO = ys[g], downs[g], ups[g]
        for k in range(weights_GNK.shape[2]):
            e = ids_GNK[g, 0, k]
            _add_one(y_NO[0], x_I, a_ERI[e], b_ERO[e], weights_GNK[g, 0, k])


@numba.njit(cache=True)
def route_and_add_one(
    ys: tuple[Array, ...],
    x_NI: Array,
    downs: tuple[Array, ...],
    ups: tuple[Array, ...],
    prototypes: tuple[Array, ...],
    sums: tuple[Array, ...],
    biases: tuple[Array, ...],
    top_k: int,
    eps: float,
    temperature: float,
    threads: int,
) -> tuple[Array, Array]:
    """Route one token and add its updates, for all layers of x in one call: more would cost more."""
    mean, rstd = _mean_and_rstd(x_NI, 0, eps)
    dots_GE = _dots(prototypes, x_NI[0], len(sums[0]), threads)
    weights_GNK = np.empty((len(ys), 1, top_k), np.float32)
    ids_GNK = np.empty((len(ys), 1, top_k), np.int64)
    scores_K, ids_K = np.empty(top_k, np.float32), np.empty(top_k, np.int64)
    for g in range(len(ys)):
        _choose_one(
            dots_GE[g : g + 1], 0, mean, rstd, sums[g], biases[g], temperature, weights_GNK[g], ids_GNK[g],
            scores_K, ids_K,
        )  # fmt: skip
    _add_ones(ys, x_NI[0], downs, ups, weights_GNK, ids_GNK)
    return weights_GNK, ids_GNK


@numba.njit(cache=True, fastmath=_FASTMATH)
def _add_one(y_O: Array, x_I: Array, a_RI: Array, b_RO: Array, weight: Any) -> None:
    """y += weight * B A x."""
    rank = len(a_RI)
    for r in range(0, rank - 3, 4):
        h0 = h1 = h2 = h3 = np.float32(0)
        for i in range(len(x_I)):
            h0 += x_I[i] * a_RI[r, i]
            h1 += x_I[i] * a_RI[r + 1, i]
            h2 += x_I[i] * a_RI[r + 2, i]
            h3 += x_I[i] * a_RI[r + 3, i]
        h0, h1, h2, h3 = h0 * weight, h1 * weight, h2 * weight, h3 * weight
        for o in range(len(y_O)):
            y_O[o] += h0 * b_RO[r, o] + h1 * b_RO[r + 1, o] + h2 * b_RO[r + 2, o] + h3 * b_RO[r + 3, o]
    for r in range(rank - rank % 4, rank):
        h0 = np.float32(0)
        for i in range(len(x_I)):
            h0 += x_I[i] * a_RI[r, i]
        h0 *= weight
        for o in range(len(y_O)):
            y_O[o] += h0 * b_RO[r, o]


@numba.njit(cache=True)
def sorted_pairs(ids_NK: Array, num_experts: int) -> tuple[Array, Array]:
    """(pairs_M as n * K + k; where each bin expert * K + k begins), by counting."""
    num_tokens, top_k = ids_NK.shape
    begins = np.zeros(num_experts * top_k + 1, np.int64)
    for n in range(num_tokens):
        for k in range(top_k):
            begins[ids_NK[n, k] * top_k + k + 1] += 1
    begins = np.cumsum(begins)
    place = begins.copy()
    pairs_M = np.empty(num_tokens * top_k, np.int64)
    for n in range(num_tokens):
        for k in range(top_k):
            group = ids_NK[n, k] * top_k + k
            pairs_M[place[group]] = n * top_k + k
            place[group] += 1
    return pairs_M, begins


@numba.njit(cache=True, parallel=True, fastmath=_FASTMATH)
def shrink(x_NI: Array, a_ERI: Array, weights_NK: Array, pairs_M: Array, begins: Array) -> Array:
    """h_MR: weight * (A x) of sorted pairs, in blocks of two tokens and four rows of A to load fewer numbers."""
    num_experts, rank, in_features = a_ERI.shape
    top_k = weights_NK.shape[1]
    h_MR = np.empty((len(pairs_M), rank), np.float32)
    for e in numba.prange(num_experts):
        begin, end = begins[e * top_k], begins[(e + 1) * top_k]
        for r in range(0, rank - 3, 4):
            for m in range(begin, end - 1, 2):
                n, other = pairs_M[m] // top_k, pairs_M[m + 1] // top_k
                h0 = h1 = h2 = h3 = g0 = g1 = g2 = g3 = np.float32(0)
                for i in range(in_features):
                    h0 += x_NI[n, i] * a_ERI[e, r, i]
                    h1 += x_NI[n, i] * a_ERI[e, r + 1, i]
                    h2 += x_NI[n, i] * a_ERI[e, r + 2, i]
                    h3 += x_NI[n, i] * a_ERI[e, r + 3, i]
                    g0 += x_NI[other, i] * a_ERI[e, r, i]
                    g1 += x_NI[other, i] * a_ERI[e, r + 1, i]
                    g2 += x_NI[other, i] * a_ERI[e, r + 2, i]
                    g3 += x_NI[other, i] * a_ERI[e, r + 3, i]
                h_MR[m, r], h_MR[m, r + 1], h_MR[m, r + 2], h_MR[m, r + 3] = h0, h1, h2, h3
                h_MR[m + 1, r], h_MR[m + 1, r + 1], h_MR[m + 1, r + 2], h_MR[m + 1, r + 3] = g0, g1, g2, g3
            if (end - begin) % 2:
                n = pairs_M[end - 1] // top_k
                h0 = h1 = h2 = h3 = np.float32(0)
                for i in range(in_features):
                    h0 += x_NI[n, i] * a_ERI[e, r, i]
                    h1 += x_NI[n, i] * a_ERI[e, r + 1, i]
                    h2 += x_NI[n, i] * a_ERI[e, r + 2, i]
                    h3 += x_NI[n, i] * a_ERI[e, r + 3, i]
                h_MR[end - 1, r], h_MR[end - 1, r + 1], h_MR[end - 1, r + 2], h_MR[end - 1, r + 3] = h0, h1, h2, h3
        for m in range(begin, end):
            n = pairs_M[m] // top_k
            for r in range(rank - rank % 4, rank):
                h0 = np.float32(0)
                for i in range(in_features):
                    h0 += x_NI[n, i] * a_ERI[e, r, i]
                h_MR[m, r] = h0
            for r in range(rank):
                h_MR[m, r] *= weights_NK[n, pairs_M[m] - n * top_k]
    return h_MR


@numba.njit(cache=True, parallel=True, fastmath=_FASTMATH)
def expand(
    h_MR: Array, b_ERO: Array, pairs_M: Array, begins: Array, y_NO: Array, top_k: int, by_columns: int, by_tokens: int
) -> None:
    """y_NO += B h, in `by_columns` * `by_tokens` shares of y: each share has one thread, which reads every B once.

    A token's experts are added in the order of their ids.
    """
    num_experts, rank, out_features = b_ERO.shape
    num_tokens = len(y_NO)
    for share in numba.prange(by_columns * by_tokens):
        column, row = np.int64(share) % by_columns, np.int64(share) // by_columns
        # unsigned: an index that may be negative keeps the loop from being vectorised
        first_o = np.uint64(out_features * column // by_columns)
        last_o = np.uint64(out_features * (column + 1) // by_columns)
        first_n, last_n = num_tokens * row // by_tokens, num_tokens * (row + 1) // by_tokens
        for e in range(num_experts):
            for r in range(0, rank - 7, 8):
                for m in range(begins[e * top_k], begins[(e + 1) * top_k]):
                    n = pairs_M[m] // top_k
                    if first_n <= n < last_n:
                        h0, h1, h2, h3 = h_MR[m, r], h_MR[m, r + 1], h_MR[m, r + 2], h_MR[m, r + 3]
                        h4, h5, h6, h7 = h_MR[m, r + 4], h_MR[m, r + 5], h_MR[m, r + 6], h_MR[m, r + 7]
                        for o in range(first_o, last_o):
                            y_NO[n, o] += (
                                h0 * b_ERO[e, r, o]
                                + h1 * b_ERO[e, r + 1, o]
                                + h2 * b_ERO[e, r + 2, o]
                                + h3 * b_ERO[e, r + 3, o]
                                + h4 * b_ERO[e, r + 4, o]
                                + h5 * b_ERO[e, r + 5, o]
                                + h6 * b_ERO[e, r + 6, o]
                                + h7 * b_ERO[e, r + 7, o]
                            )
            for m in range(begins[e * top_k], begins[(e + 1) * top_k]):
                n = pairs_M[m] // top_k
                if first_n <= n < last_n:
                    for r in range(rank - rank % 8, rank):
                        h0 = h_MR[m, r]
                        for o in range(first_o, last_o):
                            y_NO[n, o] += h0 * b_ERO[e, r, o]
