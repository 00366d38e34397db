"""Few tokens: three launches, each bound by the bytes of what it reads.

1. `scores.partial_scores`: every program reads some experts' prototypes and some features. Bytes: E * I * 4.
2. `shrink_few`: a program per token and split of I adds up the token's scores, chooses, and multiplies that split of x
   by the chosen A. Every split chooses again: E * S numbers are nothing, a launch is not. Bytes: N * K * R * I * 2.
3. `expand_few`: a program per token and block of O adds up the splits of h, multiplies by the chosen B, sums over K and
   adds to y. Bytes: N * K * R * O * 2.

A static LoRA has three launches beside the base too (A, B, add). No atomics: every number has one writer. Up to three
layers G of one x have these launches in common.

Axes: G layers of one x, N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S splits of I.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from phatgoose.kernels.cuda.choice import choose, empty_routing, keys_of_one, mean_and_rstd, read_sums
from phatgoose.kernels.cuda.launch import (
    bias_stride,
    follow,
    launch_options,
    of_layer,
    steps_of,
    sums_and_biases,
    three,
)
from phatgoose.kernels.cuda.scores import score
from phatgoose.kernels.cuda.settings import EXPAND_TILE, SHRINK_TILE, Few, power_of_two
from phatgoose.kernels.prototypes import rows_for
from phatgoose.kernels.types import Layer, Routing, Rule


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
    """h_GSNKR: weight * (A x) of one split of I. ROUTE: choose experts first, and write the routing; else read it."""
    token = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g = tl.program_id(2).to(tl.int64)
    a_ptr = of_layer(g, a0_ptr, a1_ptr, a2_ptr, LAYERS)
    weights_ptr += g * num_tokens * TOP_K
    ids_ptr += g * num_tokens * TOP_K
    h_ptr += g * tl.num_programs(1) * num_tokens * TOP_K * rank
    # the rows of all chosen A, one below the other: one loop, and x is read once
    row = tl.arange(0, K_PAD * R_PAD)
    k = row // R_PAD
    r = row % R_PAD
    in_row = (k < TOP_K) & (r < rank)
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
        weight_KR, expert_KR = choose(keys_E, num_experts, temperature, k, E_PAD, TOP_K, True)
        expert_KR = expert_KR.to(tl.int64)
        if split == 0:
            at_KR = token * TOP_K + k
            tl.store(weights_ptr + at_KR, weight_KR, mask=in_row & (r == 0))
            tl.store(ids_ptr + at_KR, expert_KR, mask=in_row & (r == 0))
    else:
        weight_KR = tl.load(weights_ptr + token * TOP_K + k, mask=in_row, other=0.0).to(tl.float32)
        expert_KR = tl.load(ids_ptr + token * TOP_K + k, mask=in_row, other=0)
    a_row = (expert_KR * rank + r) * in_features
    acc_KRI = tl.zeros([K_PAD * R_PAD, BLOCK_I], tl.float32)
    for step in tl.range(0, STEPS):
        i = (split * STEPS + step) * BLOCK_I + tl.arange(0, BLOCK_I)
        in_i = i < in_features
        x_I = tl.load(x_ptr + token * stride_x + i, mask=in_i, other=0.0).to(tl.float32)
        a_KRI = tl.load(a_ptr + a_row[:, None] + i[None, :], mask=in_row[:, None] & in_i[None, :], other=0.0)
        acc_KRI += a_KRI.to(tl.float32) * x_I[None, :]
    h_KR = tl.sum(acc_KRI, axis=1) * weight_KR
    at_KR = ((split * num_tokens + token) * TOP_K + k) * rank + r
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
    """y_NO += sum over k of B h. Each layer has its own O; programs past a narrower layer exit."""
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
    for k in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + token * TOP_K + k)
        b_row = (expert * rank + r) * out_features
        b_RO = tl.load(b_ptr + b_row[:, None] + o[None, :], mask=in_r[:, None] & in_o[None, :], other=0.0)
        # S x R, not R x S: else h would bring B into its own arrangement, through shared memory
        at_S = ((s * num_tokens + token) * TOP_K + k) * rank
        h_R = tl.sum(tl.load(h_ptr + at_S[:, None] + r[None, :], mask=in_r[None, :], other=0.0), axis=0)
        update_O += tl.sum(h_R[:, None] * b_RO.to(tl.float32), axis=0)
    y_O = (y_O.to(tl.float32) + update_O).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + token * stride_y + o, y_O, mask=in_o)


def linears(
    x_NI: torch.Tensor,
    bases: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    layers: Sequence[Layer],
    rule: Rule,
    settings: Few,
) -> tuple[list[torch.Tensor], Routing]:
    """(outputs of up to three layers of one x, the routing with an axis G in front).

    The base layers run at the same time as routing and A, on another stream (in a captured graph: another branch). With
    PDL they are launched first, and with priority: they read the most, and what they leave of a GPU is enough for the
    rest. Without PDL that would be slower (docs/kernels.md).
    All memory is allocated on the current stream: the other one waits for it first, and it for the other one before B.

    Args:
        bases: weight_OI and bias_O of each base layer.
    """
    main = torch.cuda.current_stream(x_NI.device)
    stream = torch.cuda.Stream(x_NI.device, priority=-1 if settings.pdl else 0)
    stream.wait_stream(main)
    ys = [x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]) for weight_OI, _ in bases]
    if settings.pdl:
        _linears(ys, x_NI, bases, stream)
    h_GSNKR, routing = _route_and_shrink(x_NI, layers, rule, settings)
    if not settings.pdl:
        _linears(ys, x_NI, bases, stream)
    main.wait_stream(stream)
    _expand(ys, h_GSNKR, [layer.b_ERO for layer in layers], routing.expert_ids_NK, settings)
    return ys, routing


def add_(ys: Sequence[torch.Tensor], x_NI: torch.Tensor, layers: Sequence[Layer], rule: Rule, settings: Few) -> Routing:
    """ys += the chosen experts' updates of up to three layers of one x; the routing has an axis G in front."""
    h_GSNKR, routing = _route_and_shrink(x_NI, layers, rule, settings)
    _expand(ys, h_GSNKR, [layer.b_ERO for layer in layers], routing.expert_ids_NK, settings)
    return routing


def add_given_(
    y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing, settings: Few
) -> None:
    """y_NO += the updates of one layer, by a routing that somebody else chose."""
    routing = Routing(routing.weights_NK.unsqueeze(0), routing.expert_ids_NK.unsqueeze(0))
    h_GSNKR = _shrink(x_NI, [a_ERI], routing, None, settings)
    _expand([y_NO], h_GSNKR, [b_ERO], routing.expert_ids_NK, settings)


class _Scored(NamedTuple):
    """What `shrink_few` chooses from."""

    dots_GSNE: torch.Tensor
    stats_SN2: torch.Tensor
    layers: Sequence[Layer]
    rule: Rule


def _route_and_shrink(
    x_NI: torch.Tensor, layers: Sequence[Layer], rule: Rule, settings: Few
) -> tuple[torch.Tensor, Routing]:
    """(h_GSNKR, the routing with an axis G in front)."""
    scored = _Scored(*score(x_NI, layers, settings.scores, pdl=settings.pdl), layers, rule)
    routing = empty_routing(x_NI, len(layers), rule.top_k)
    return _shrink(x_NI, [layer.a_ERI for layer in layers], routing, scored, settings), routing


def _shrink(
    x_NI: torch.Tensor, downs: Sequence[torch.Tensor], routing: Routing, scored: _Scored | None, settings: Few
) -> torch.Tensor:
    """h_GSNKR, fp32, times the routing weights.

    Args:
        downs: a_ERI of up to three layers.
        routing: with an axis G in front; written if there are scores, else read.
    """
    (num_tokens, in_features), (num_experts, rank, _) = x_NI.shape, downs[0].shape
    top_k = routing.weights_NK.shape[2]
    if scored is None:
        inputs, splits = (routing.weights_NK,) * 8, 1  # nothing of it is read
        eps, temperature, stride_bias, has_bias = 0.0, 1.0, 0, False
    else:
        first = scored.layers[0]
        inputs = (scored.dots_GSNE, scored.stats_SN2, *sums_and_biases(scored.layers))
        splits, (_, eps, temperature) = settings.scores.splits, scored.rule
        stride_bias, has_bias = bias_stride(first), first.bias_NE is not None
    k_pad, r_pad = power_of_two(top_k), power_of_two(rank)
    block_i = max(16, min(settings.shrink_block_i, SHRINK_TILE * settings.shrink_warps // (k_pad * r_pad)))
    h_GSNKR = x_NI.new_empty(len(downs), settings.shrink_splits, num_tokens, top_k, rank, dtype=torch.float32)
    shrink_few[(num_tokens, settings.shrink_splits, len(downs))](
        x_NI,
        *inputs,
        *three(downs),
        routing.weights_NK,
        routing.expert_ids_NK,
        h_GSNKR,
        num_tokens,
        num_experts,
        in_features,
        rank,
        x_NI.stride(0),
        rows_for(num_experts),
        stride_bias,
        eps,
        temperature,
        LAYERS=len(downs),
        SPLITS=splits,
        E_PAD=power_of_two(num_experts),
        TOP_K=top_k,
        K_PAD=k_pad,
        R_PAD=r_pad,
        BLOCK_I=block_i,
        STEPS=steps_of(in_features, block_i, settings.shrink_splits),
        HAS_BIAS=has_bias,
        ROUTE=scored is not None,
        **launch_options(settings.pdl and x_NI.is_cuda, settings.shrink_warps),
    )
    return h_GSNKR


def _expand(
    ys: Sequence[torch.Tensor],
    h_GSNKR: torch.Tensor,
    ups: Sequence[torch.Tensor],
    expert_ids_GNK: torch.Tensor,
    settings: Few,
) -> None:
    """ys += B h. Args: `ys` of one dtype, and `ups` (b_ERO), of up to three layers."""
    _, splits, num_tokens, top_k, rank = h_GSNKR.shape
    widths, r_pad = [y_NO.shape[1] for y_NO in ys], power_of_two(rank)
    block_o = max(32, min(settings.expand_block_o, EXPAND_TILE * settings.expand_warps // r_pad))
    expand_few[(num_tokens, triton.cdiv(max(widths), block_o), len(ys))](
        *three(ys),
        h_GSNKR,
        *three(ups),
        expert_ids_GNK,
        num_tokens,
        *three(widths),
        rank,
        *three([y_NO.stride(0) for y_NO in ys]),
        LAYERS=len(ys),
        SPLITS=splits,
        TOP_K=top_k,
        R_PAD=r_pad,
        BLOCK_O=block_o,
        **launch_options(settings.pdl and ys[0].is_cuda, settings.expand_warps),
    )


def _linears(
    ys: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    bases: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    stream: torch.cuda.Stream,
) -> None:
    """Write the base layers' outputs, on a stream."""
    with torch.cuda.stream(stream):
        for y_NO, (weight_OI, bias_O) in zip(ys, bases, strict=True):
            if bias_O is None:
                torch.mm(x_NI, weight_OI.T, out=y_NO)
            else:
                torch.addmm(bias_O, x_NI, weight_OI.T, out=y_NO)
