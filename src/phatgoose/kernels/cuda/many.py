"""Many tokens: pairs sorted by expert, then one grouped product for A and one per k for B.

`shrink_many` gathers x in place of a sorted copy. `expand_many` runs once per k: within a k a token occurs once, so y
is read, added to and written by one program, without atomics and without a tensor of N * K * O numbers. It takes so
many columns that they stay in the L2 cache from one k to the next: then y goes through memory once, whatever K is. In
one pass for all columns, y would go through memory K times.

Grids come from shapes alone: as many tiles as the worst routing needs. Programs of empty tiles end at once.

Axes: G layers of one x, N tokens, E experts, K chosen experts, M = N * K sorted pairs, T tiles, I in-features,
O out-features, R rank, S splits of I.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from phatgoose.kernels.cuda.choice import Unweighted, mean_and_rstd, route_many, weights_of_pairs
from phatgoose.kernels.cuda.launch import follow, launch_options, of_layer, product, steps_of, three
from phatgoose.kernels.cuda.settings import Many, power_of_two
from phatgoose.kernels.cuda.sort import Sorted, narrow_ids, sort_pairs
from phatgoose.kernels.types import Layer, Routing, Rule


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def shrink_many(
    x_ptr,
    a0_ptr,
    a1_ptr,
    a2_ptr,
    pairs_ptr,
    weights_ptr,
    scores_ptr,
    means_ptr,
    tiles_ptr,
    h_ptr,
    num_pairs,
    num_tiles,
    in_features,
    rank,
    stride_x,
    eps,
    temperature,
    LAYERS: tl.constexpr,
    TOP_K: tl.constexpr,
    K_PAD: tl.constexpr,
    R_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    WEIGH: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h_GSMR: weight * (A x) of sorted pairs.

    WEIGH: weights are written, not read. They come from scores_GNK and means_N2 (see `choice.choose_many`) and from
    the sums of squares of x, all of which passes through here, in one split.
    """
    split = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    a_ptr = of_layer(g, a0_ptr, a1_ptr, a2_ptr, LAYERS)
    pairs_ptr += g * num_pairs
    weights_ptr += g * num_pairs
    scores_ptr += g * num_pairs
    h_ptr += g * tl.num_programs(1) * num_pairs * rank
    at = tiles_ptr + g * 3 * num_tiles + tl.program_id(0)
    expert = tl.load(at)
    first = tl.load(at + num_tiles)
    end = tl.load(at + 2 * num_tiles)
    if first < end:
        m = first + tl.arange(0, ROWS)
        in_m = m < end
        pair_M = tl.load(pairs_ptr + m, mask=in_m, other=0).to(tl.int64)
        n = pair_M // TOP_K
        r = tl.arange(0, R_PAD)
        in_r = r < rank
        a_row = (expert.to(tl.int64) * rank + r) * in_features
        h_MR = tl.zeros([ROWS, R_PAD], tl.float32)
        squares_MM = tl.zeros([ROWS, ROWS], tl.float32)
        for step in tl.range(0, STEPS):
            i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
            in_i = i < in_features
            x_MI = tl.load(x_ptr + n[:, None] * stride_x + i[None, :], mask=in_m[:, None] & in_i[None, :], other=0.0)
            a_RI = tl.load(a_ptr + a_row[:, None] + i[None, :], mask=in_r[:, None] & in_i[None, :], other=0.0)
            h_MR = product(x_MI, a_RI.T, h_MR, UPCAST)
            if WEIGH:  # by matrix units: they read x where it lies, all else would carry it into registers
                squares_MM = product(x_MI, x_MI.T, squares_MM, UPCAST)
        if WEIGH:
            mean_M = tl.load(means_ptr + 2 * n, mask=in_m, other=0.0)
            is_score_M = tl.load(means_ptr + 2 * n + 1, mask=in_m, other=0.0) != 0.0
            row = tl.arange(0, ROWS)
            square_M = tl.sum(tl.where(row[:, None] == row[None, :], squares_MM, 0.0), axis=1)
            _, rstd_M = mean_and_rstd(mean_M * in_features, square_M, in_features, eps)
            k = tl.arange(0, K_PAD)
            in_mk = in_m[:, None] & (k < TOP_K)[None, :]
            scores_MK = tl.load(scores_ptr + n[:, None] * TOP_K + k[None, :], mask=in_mk, other=float("-inf"))
            scores_MK = scores_MK * tl.where(is_score_M, 1.0, rstd_M)[:, None] / temperature
            weights_M = weights_of_pairs(scores_MK, (pair_M % TOP_K).to(tl.int32), k)
            tl.store(weights_ptr + pair_M, weights_M, mask=in_m)
        else:
            weights_M = tl.load(weights_ptr + pair_M, mask=in_m, other=0.0).to(tl.float32)
        at_M = (split.to(tl.int64) * num_pairs + m) * rank
        h_MR = (h_MR * weights_M[:, None]).to(h_ptr.dtype.element_ty)
        tl.store(h_ptr + at_M[:, None] + r[None, :], h_MR, mask=in_m[:, None] & in_r[None, :])


@triton.jit(do_not_specialize=["k", "num_pairs", "num_tiles"])
def expand_many(
    y_ptr,
    h_ptr,
    b_ptr,
    pairs_ptr,
    tiles_ptr,
    k,
    first_o,
    last_o,
    num_pairs,
    num_tiles,
    out_features,
    rank,
    stride_y,
    SPLITS: tl.constexpr,
    TOP_K: tl.constexpr,
    R_PAD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    WRITE: tl.constexpr,
    UPCAST: tl.constexpr,
    PDL: tl.constexpr,
):
    """y_NO += B h of the sorted pairs of one k, for columns from first_o to last_o (a multiple of BLOCK_O, or O).

    WRITE: y_NO = B h, because every token has a pair of every k.
    """
    follow(PDL)
    at = tiles_ptr + k * 3 * num_tiles + tl.program_id(0)
    expert = tl.load(at)
    first = tl.load(at + num_tiles)
    end = tl.load(at + 2 * num_tiles)
    if first < end:
        m = first + tl.arange(0, ROWS)
        in_m = m < end
        n = tl.load(pairs_ptr + m, mask=in_m, other=0).to(tl.int64) // TOP_K
        r = tl.arange(0, R_PAD)
        in_r = r < rank
        b_row = (expert.to(tl.int64) * rank + r) * out_features
        h_MR = tl.zeros([ROWS, R_PAD], tl.float32)
        for split in tl.static_range(SPLITS):
            at_M = (m + split * num_pairs).to(tl.int64) * rank
            h = tl.load(h_ptr + at_M[:, None] + r[None, :], mask=in_m[:, None] & in_r[None, :], other=0.0)
            h_MR += h.to(tl.float32)
        o = first_o + tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
        in_o = o < last_o
        b_RO = tl.load(b_ptr + b_row[:, None] + o[None, :], mask=in_r[:, None] & in_o[None, :], other=0.0)
        y_at = y_ptr + n[:, None] * stride_y + o[None, :]
        in_mo = in_m[:, None] & in_o[None, :]
        y_MO = tl.zeros([ROWS, BLOCK_O], y_ptr.dtype.element_ty)
        if not WRITE:
            y_MO = tl.load(y_at, mask=in_mo, other=0.0)
        update_MO = product(h_MR.to(b_RO.dtype), b_RO, tl.zeros([ROWS, BLOCK_O], tl.float32), UPCAST)
        tl.store(y_at, (y_MO.to(tl.float32) + update_MO).to(y_ptr.dtype.element_ty), mask=in_mo)


def linears(
    x_NI: torch.Tensor, weights: Sequence[torch.Tensor], layers: Sequence[Layer], rule: Rule, settings: Many
) -> tuple[list[torch.Tensor], Routing]:
    """(outputs of up to three layers of one x, the routing with an axis G in front).

    First the updates, then the base layers, which have no bias, add themselves: B's first launch writes y and reads
    none, and the base layer's product, which is bound by arithmetic, reads y.

    Args:
        weights: weight_OI of each base layer.
    """
    ys = [x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]) for weight_OI in weights]
    routing = add_(ys, x_NI, layers, rule, settings, write=True)
    return [y_NO.addmm_(x_NI, weight_OI.T) for y_NO, weight_OI in zip(ys, weights, strict=True)], routing


def add_(
    ys: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    layers: Sequence[Layer],
    rule: Rule,
    settings: Many,
    *,
    write: bool = False,
) -> Routing:
    """ys += the chosen experts' updates of up to three layers of one x, all but B in the launches of one.

    Args:
        write: ys = the updates.

    Returns:
        The routing with an axis G in front.
    """
    routing, ids_GKN, unweighted = route_many(x_NI, layers, rule, settings)
    pairs = sort_pairs(ids_GKN, len(x_NI), len(layers[0].a_ERI), settings)
    h_GSMR = _shrink(x_NI, [layer.a_ERI for layer in layers], routing.weights_NK, unweighted, pairs, settings)
    for g, (y_NO, layer) in enumerate(zip(ys, layers, strict=True)):
        _expand(y_NO, h_GSMR.select(0, g), layer.b_ERO, pairs.layer(g), settings, write=write)
    return routing


def add_given_(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    routing: Routing,
    settings: Many,
) -> None:
    """y_NO += the updates of one layer, by a routing that somebody else chose."""
    ids_GKN = narrow_ids(routing.expert_ids_NK.unsqueeze(0))
    pairs = sort_pairs(ids_GKN, len(x_NI), len(a_ERI), settings)
    h_GSMR = _shrink(x_NI, [a_ERI], routing.weights_NK.unsqueeze(0), None, pairs, settings)
    _expand(y_NO, h_GSMR.select(0, 0), b_ERO, pairs.layer(0), settings, write=False)


def _shrink(
    x_NI: torch.Tensor,
    downs: Sequence[torch.Tensor],
    weights_GNK: torch.Tensor,
    unweighted: Unweighted | None,
    sorted_pairs: Sorted,
    settings: Many,
) -> torch.Tensor:
    """h_GSMR: weight * (A x) of sorted pairs; fp32, or, if nothing is to be added up, as B multiplies it.

    With `unweighted` it writes the weights.
    """
    (layers, num_pairs), (_, rank, in_features) = sorted_pairs.pairs_M.shape, downs[0].shape
    dtype = x_NI.dtype if settings.shrink_splits == 1 else torch.float32
    h_GSMR = x_NI.new_empty(layers, settings.shrink_splits, num_pairs, rank, dtype=dtype)
    num_tiles, top_k = sorted_pairs.shrink_tiles_3T.shape[2], weights_GNK.shape[2]
    scores_GNK, means_N2, *rule = unweighted or (weights_GNK, weights_GNK, 0.0, 1.0)
    shrink_many[(num_tiles, settings.shrink_splits, layers)](
        x_NI,
        *three(downs),
        sorted_pairs.pairs_M,
        weights_GNK,
        scores_GNK,
        means_N2,
        sorted_pairs.shrink_tiles_3T,
        h_GSMR,
        num_pairs,
        num_tiles,
        in_features,
        rank,
        x_NI.stride(0),
        *rule,
        LAYERS=layers,
        TOP_K=top_k,
        K_PAD=power_of_two(top_k),
        R_PAD=max(16, power_of_two(rank)),
        ROWS=settings.shrink_rows,
        BLOCK_I=settings.shrink_block_i,
        STEPS=steps_of(in_features, settings.shrink_block_i, settings.shrink_splits),
        WEIGH=unweighted is not None,
        UPCAST=not x_NI.is_cuda,
        num_warps=settings.shrink_warps,
        num_stages=settings.shrink_stages,
    )
    return h_GSMR


def _expand(
    y_NO: torch.Tensor,
    h_SMR: torch.Tensor,
    b_ERO: torch.Tensor,
    sorted_pairs: Sorted,
    settings: Many,
    *,
    write: bool,
) -> None:
    """y_NO += B h of one layer; with `write` y_NO = B h."""
    num_tokens, (_, rank, out_features) = y_NO.shape[0], b_ERO.shape
    top_k, _, num_tiles = sorted_pairs.expand_tiles_K3T.shape
    for first_o, last_o in _columns(num_tokens * y_NO.element_size(), out_features, settings):
        for k in range(top_k):
            expand_many[(num_tiles, triton.cdiv(last_o - first_o, settings.expand_block_o))](
                y_NO,
                h_SMR,
                b_ERO,
                sorted_pairs.pairs_M,
                sorted_pairs.expand_tiles_K3T,
                k,
                first_o,
                last_o,
                h_SMR.shape[1],
                num_tiles,
                out_features,
                rank,
                y_NO.stride(0),
                SPLITS=settings.shrink_splits,
                TOP_K=top_k,
                R_PAD=max(16, power_of_two(rank)),
                ROWS=settings.expand_rows,
                BLOCK_O=settings.expand_block_o,
                WRITE=write and k == 0,
                UPCAST=not y_NO.is_cuda,
                **launch_options(settings.pdl and y_NO.is_cuda, settings.expand_warps),
            )


def _columns(bytes_a_column: int, out_features: int, settings: Many) -> list[tuple[int, int]]:
    """Ranges of columns of about `expand_bytes`, alike but for the last one."""
    blocks = triton.cdiv(out_features, settings.expand_block_o)
    ranges = triton.cdiv(bytes_a_column * out_features, settings.expand_bytes)
    width = triton.cdiv(blocks, min(ranges, blocks)) * settings.expand_block_o
    return [(first, min(first + width, out_features)) for first in range(0, out_features, width)]
