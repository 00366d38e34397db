"""Launches of the Triton kernels for many tokens: route, sort, shrink, expand.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S splits of I, M = N * K pairs,
C blocks of tokens.
"""

from __future__ import annotations

import torch
import triton

from phatgoose.kernels.launches import (
    Choice,
    Question,
    bias_stride,
    empty_choice,
    inputs_of_choice,
    options,
    padded,
    score,
    steps_of,
)
from phatgoose.kernels.many_tokens import expand_many, shrink_many
from phatgoose.kernels.settings import Many, power_of_two
from phatgoose.kernels.sorting import choose_many, count_pairs, place_pairs


def linear_after(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    routing: Question | Choice,
    settings: Many,
) -> tuple[torch.Tensor, Choice]:
    """(a layer's output with the updates, the choice), for many tokens: first the updates, then the layer adds itself.

    B's first launch then writes y and reads none, and the layer's product, which is bound by arithmetic, reads y.
    """
    y_NO = x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0])
    choice = add_many(y_NO, x_NI, a_ERI, b_ERO, routing, settings, write=True)
    return y_NO.addmm_(x_NI, weight_OI.T), choice


def add_many(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    routing: Question | Choice,
    settings: Many,
    *,
    write: bool = False,
) -> Choice:
    """y_NO += the chosen experts' updates of x_NI, for many tokens; with `write` y_NO = the updates."""
    (num_tokens, in_features), (num_experts, rank, out_features) = x_NI.shape, b_ERO.shape
    choice, counts_CKE, steps = _choose(x_NI, routing, num_experts, settings)
    top_k = choice.weights_NK.shape[1]
    num_pairs, num_blocks = num_tokens * top_k, counts_CKE.shape[0]
    e_pad, k_pad, r_pad = power_of_two(num_experts), power_of_two(top_k), max(16, power_of_two(rank))
    pdl = settings.pdl and x_NI.is_cuda

    tokens_M = choice.expert_ids_NK.new_empty(num_pairs, dtype=torch.int32)
    sorted_weights_M = choice.weights_NK.new_empty(num_pairs, dtype=torch.float32)
    begins = tokens_M.new_empty(num_experts * top_k + 1)
    shrink_ends_E, expand_ends_KE = tokens_M.new_empty(num_experts), tokens_M.new_empty(top_k, num_experts)
    block_c = min(settings.sort_block_c, power_of_two(num_blocks))
    # a program places the tokens that one of `_choose` counted
    place_block_n = min(settings.place_block_n, power_of_two(steps) * settings.choose_block_n)
    place_steps = triton.cdiv(steps * settings.choose_block_n, place_block_n)
    place_pairs[(num_blocks,)](
        choice.expert_ids_NK,
        choice.weights_NK,
        counts_CKE,
        tokens_M,
        sorted_weights_M,
        begins,
        shrink_ends_E,
        expand_ends_KE,
        num_tokens,
        num_experts,
        counts_CKE.shape[2],
        num_blocks,
        steps * settings.choose_block_n,
        place_steps,
        triton.cdiv(num_blocks, block_c),
        E_PAD=e_pad,
        TOP_K=top_k,
        K_PAD=k_pad,
        BLOCK_N=place_block_n,
        BLOCK_C=block_c,
        SHRINK_ROWS=settings.shrink_rows,
        EXPAND_ROWS=settings.expand_rows,
        ONE_STEP=place_steps == 1,
        **options(pdl, settings.place_warps),
    )

    h_SMR = x_NI.new_empty(settings.shrink_splits, num_pairs, rank, dtype=torch.float32)
    shrink_many[(_most_tiles(num_pairs, num_experts, settings.shrink_rows), settings.shrink_splits)](
        x_NI,
        a_ERI,
        tokens_M,
        sorted_weights_M,
        begins,
        shrink_ends_E,
        h_SMR,
        num_pairs,
        num_experts,
        in_features,
        rank,
        x_NI.stride(0),
        E_PAD=e_pad,
        TOP_K=top_k,
        R_PAD=r_pad,
        ROWS=settings.shrink_rows,
        BLOCK_I=settings.shrink_block_i,
        STEPS=steps_of(in_features, settings.shrink_block_i, settings.shrink_splits),
        UPCAST=not x_NI.is_cuda,
        **options(pdl, settings.shrink_warps, settings.shrink_stages),
    )
    tiles = _most_tiles(num_tokens, num_experts, settings.expand_rows)
    for first_o, last_o in _columns(num_tokens * y_NO.element_size(), out_features, settings):
        for slot in range(top_k):
            expand_many[(tiles, triton.cdiv(last_o - first_o, settings.expand_block_o))](
                y_NO,
                h_SMR,
                b_ERO,
                tokens_M,
                begins,
                expand_ends_KE,
                slot,
                first_o,
                last_o,
                num_pairs,
                num_experts,
                out_features,
                rank,
                y_NO.stride(0),
                SPLITS=settings.shrink_splits,
                E_PAD=e_pad,
                TOP_K=top_k,
                R_PAD=r_pad,
                ROWS=settings.expand_rows,
                BLOCK_O=settings.expand_block_o,
                WRITE=write and slot == 0,
                UPCAST=not x_NI.is_cuda,
                **options(pdl, settings.expand_warps),
            )
    return choice


def _choose(
    x_NI: torch.Tensor, routing: Question | Choice, num_experts: int, settings: Many
) -> tuple[Choice, torch.Tensor, int]:
    """(the choice, counts_CKE of it, steps: how many blocks of tokens one of C programs takes)."""
    num_tokens, in_features = x_NI.shape
    pdl = settings.pdl and x_NI.is_cuda
    chunks = triton.cdiv(num_tokens, settings.choose_block_n)
    steps = triton.cdiv(chunks, settings.most_blocks)
    num_blocks = triton.cdiv(chunks, steps)
    if isinstance(routing, Question):
        dots_GSNE, stats_SN2 = score(x_NI, [routing], settings.scores, pdl)
        choice = empty_choice(x_NI, 1, routing.top_k).of_layer(0)
        scored = inputs_of_choice(dots_GSNE, stats_SN2, routing)
    else:
        choice = routing
    top_k = choice.weights_NK.shape[1]
    counts_CKE = choice.expert_ids_NK.new_empty(num_blocks, top_k, padded(num_experts), dtype=torch.int32)
    sizes = {
        "E_PAD": power_of_two(num_experts),
        "TOP_K": top_k,
        "K_PAD": power_of_two(top_k),
        "BLOCK_N": settings.choose_block_n,
        **options(pdl, settings.choose_warps),
    }
    if isinstance(routing, Question):
        choose_many[(num_blocks,)](
            *scored,
            choice.weights_NK,
            choice.expert_ids_NK,
            counts_CKE,
            num_tokens,
            num_experts,
            in_features,
            padded(num_experts),
            bias_stride(routing),
            routing.eps,
            routing.temperature,
            steps,
            SPLITS=settings.scores.splits,
            HAS_BIAS=routing.bias_NE is not None,
            **sizes,
        )
    else:
        count_pairs[(num_blocks,)](choice.expert_ids_NK, counts_CKE, num_tokens, padded(num_experts), steps, **sizes)
    return choice, counts_CKE, steps


def _columns(bytes_a_column: int, out_features: int, settings: Many) -> list[tuple[int, int]]:
    """Ranges of columns of about `expand_bytes`, alike but for the last one."""
    blocks = triton.cdiv(out_features, settings.expand_block_o)
    ranges = triton.cdiv(bytes_a_column * out_features, settings.expand_bytes)
    width = triton.cdiv(blocks, min(ranges, blocks)) * settings.expand_block_o
    return [(first, min(first + width, out_features)) for first in range(0, out_features, width)]


def _most_tiles(rows: int, num_experts: int, rows_per_tile: int) -> int:
    """Tiles that `rows` in groups by expert can need at most."""
    groups = min(rows, num_experts)
    return (rows + groups * (rows_per_tile - 1)) // rows_per_tile
