"""Triton: where top-k is chosen, from scores to experts and weights.

Few tokens choose inside `few.shrink_few`, many in `choose_many`: a program of one warp for each token, so that nothing
waits for another warp, for all layers of x. Both call `choose`.

Axes: G layers of one x, N tokens, E experts (padded), K chosen experts, I in-features, S splits of I, M = N * K pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phatgoose.kernels.cuda.launch import bias_stride, of_layer, sums_and_biases
from phatgoose.kernels.cuda.scores import score_many
from phatgoose.kernels.cuda.settings import Many, power_of_two
from phatgoose.kernels.prototypes import padded
from phatgoose.kernels.types import Layer, Routing, Rule


@triton.jit
def keys(scores, in_e):
    """Integers in the order of scores, with room below -inf for "taken" and "no expert". NaN is the largest."""
    scores = tl.where(scores == 0.0, 0.0, scores)  # -0 and 0 tie
    bits = scores.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    ordered = tl.where(scores != scores, 0x7FFFFFFF, ordered)
    return tl.where(in_e, ordered, -0x80000000)


@triton.jit
def score_of(key):
    """The score that `keys` made this key of."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def mean_and_rstd(total, square, in_features, eps):
    """Mean and 1 / standard deviation of one token's x, from its sum and its sum of squares."""
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
def choose(keys_E, num_experts, temperature, k, E_PAD: tl.constexpr, TOP_K: tl.constexpr, WEIGHTS: tl.constexpr):
    """(weights, experts) of one token, for each number in `k`; those from TOP_K on get the last one's.

    The larger score wins, and of equal ones the lower expert id. NaN counts as the largest. A token whose scores are
    all -inf gets weights of 0. In scalars: an axis of one token would be carried through shared memory.
    Not WEIGHTS: scores in their place.
    """
    e = tl.arange(0, E_PAD)
    weights = tl.zeros(k.shape, tl.float32)
    experts = tl.zeros(k.shape, tl.int32)
    first, total = 0.0, 0.0
    for j in tl.static_range(TOP_K):
        best = tl.max(keys_E, axis=0)
        expert = tl.minimum(tl.min(tl.where(keys_E == best, e, E_PAD), axis=0), num_experts - 1)
        keys_E = tl.where(e == expert, -0x80000000, keys_E)
        weight = score_of(best)
        if WEIGHTS:
            weight /= temperature
            if j == 0:
                first = tl.where(weight == float("-inf"), 0.0, weight)
            weight = tl.exp(weight - first)
            total += weight
        weights = tl.where(k >= j, weight, weights)
        experts = tl.where(k >= j, expert, experts)
    if WEIGHTS:
        weights /= tl.where(total == 0.0, 1.0, total)
    return weights, experts


@triton.jit
def weights_of_pairs(scores_MK, k_M, k):
    """The weight of pair (row, k_M), from the scores of all k, of which the first is the largest; like `choose`."""
    first_M = tl.sum(tl.where(k[None, :] == 0, scores_MK, 0.0), axis=1)
    first_M = tl.where(first_M == float("-inf"), 0.0, first_M)
    weights_MK = tl.exp(scores_MK - first_M[:, None])
    total_M = tl.sum(weights_MK, axis=1)
    own_M = tl.sum(tl.where(k[None, :] == k_M[:, None], weights_MK, 0.0), axis=1)
    return own_M / tl.where(total_M == 0.0, 1.0, total_M)


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

    The scores of a layer and a token are stride_g and stride_n apart; see `keys_of_one` for the rest.
    A row of ids_GKN has stride_k numbers, a multiple of 16; those past the last token are undefined.

    Sums of x are read, or (SPLITS = 0) made here: x is then read once for all layers. LATE: the next kernel that reads
    x (`many.shrink_many`) makes the sums of squares, and so the weights. The sum alone is a product with ones, in the
    column after the last expert of the first layer. Experts are then chosen before rstd multiplies their scores, and
    the scores are written in place of weights; means_N2 is (the mean of x, 0). Only where a finite bias is added does
    the order depend on rstd; there rstd multiplies here, and means_N2 is (mean, 1).
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


class Unweighted(NamedTuple):
    """What weights will be made of; see `choose_many` and `many.shrink_many`."""

    scores_GNK: torch.Tensor
    means_N2: torch.Tensor
    eps: float
    temperature: float


def empty_routing(x_NI: torch.Tensor, layers: int, top_k: int) -> Routing:
    """A routing to be written, with an axis G in front."""
    return Routing(
        x_NI.new_empty(layers, x_NI.shape[0], top_k, dtype=torch.float32),
        x_NI.new_empty(layers, x_NI.shape[0], top_k, dtype=torch.int64),
    )


def route_many(
    x_NI: torch.Tensor, layers: Sequence[Layer], rule: Rule, settings: Many
) -> tuple[Routing, torch.Tensor, Unweighted | None]:
    """(the routing with an axis G in front; the expert ids again, as `sort.narrow_ids`; what weights still need)."""
    (num_tokens, in_features), num_experts, top_k = x_NI.shape, len(layers[0].gate_sums_E), rule.top_k
    scored = score_many(x_NI, layers, settings)
    routing = empty_routing(x_NI, len(layers), top_k)
    ids_GKN = x_NI.new_empty(len(layers), top_k, padded(num_tokens), dtype=torch.int32)
    stats_SN2, unweighted, written = scored.stats_SN2, None, routing.weights_NK
    if stats_SN2 is None and settings.weigh_late:
        means_N2 = x_NI.new_empty(num_tokens, 2, dtype=torch.float32)
        unweighted = Unweighted(torch.empty_like(routing.weights_NK), means_N2, rule.eps, rule.temperature)
        written = unweighted.scores_GNK
    block_i = min(2048, power_of_two(in_features))
    choose_many[(num_tokens,)](
        x_NI,
        scored.dots,
        scored.dots if stats_SN2 is None else stats_SN2,
        scored.dots if unweighted is None else unweighted.means_N2,
        *sums_and_biases(layers),
        written,
        routing.expert_ids_NK,
        ids_GKN,
        num_tokens,
        num_experts,
        in_features,
        x_NI.stride(0),
        *scored.strides,
        bias_stride(layers[0]),
        ids_GKN.shape[2],
        rule.eps,
        rule.temperature,
        LAYERS=len(layers),
        PARTS=scored.parts,
        SPLITS=0 if stats_SN2 is None else len(stats_SN2),
        BLOCK_I=block_i,
        STEPS=triton.cdiv(in_features, block_i),
        E_PAD=power_of_two(num_experts),
        TOP_K=top_k,
        K_PAD=power_of_two(top_k),
        HAS_BIAS=layers[0].bias_NE is not None,
        LATE=unweighted is not None,
        num_warps=1,
    )
    return routing, ids_GKN, unweighted
