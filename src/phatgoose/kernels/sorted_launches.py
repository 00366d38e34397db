"""Launches of the Triton kernels for many tokens: route, sort, shrink, expand.

Axes: G layers of one x, N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S splits of I,
M = N * K pairs, C blocks of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from phatgoose.kernels.launches import (
    Choice,
    Question,
    bias_stride,
    empty_choice,
    options,
    padded,
    per_layer,
    score,
    steps_of,
    three,
)
from phatgoose.kernels.many_tokens import expand_many, shrink_many
from phatgoose.kernels.settings import PROGRAMS, Many, power_of_two
from phatgoose.kernels.sorting import choose_many, count_pairs, place_pairs


def linears_after(
    x_NI: torch.Tensor,
    weights: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    questions: Sequence[Question],
    settings: Many,
) -> tuple[list[torch.Tensor], Choice]:
    """(outputs of up to three layers of one x, the choices with an axis G in front), for many tokens.

    First the updates, then the base layers, which have no bias, add themselves: B's first launch writes y and reads
    none, and the layer's product, which is bound by arithmetic, reads y.

    Args:
        weights: weight_OI of each layer.
        downs, ups, questions: see `add_many_shared`.
    """
    outputs = [x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]) for weight_OI in weights]
    choice = add_many_shared(outputs, x_NI, downs, ups, questions, settings, write=True)
    return [y.addmm_(x_NI, weight_OI.T) for y, weight_OI in zip(outputs, weights, strict=True)], choice


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
    routings: Any = [routing]
    return add_many_shared([y_NO], x_NI, [a_ERI], [b_ERO], routings, settings, write=write).of_layer(0)


def add_many_shared(
    outputs: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    routings: Sequence[Question] | Sequence[Choice],
    settings: Many,
    *,
    write: bool = False,
) -> Choice:
    """What `add_many` does, for up to three layers of one x: all but B in the launches of one.

    Args:
        outputs: y_NO of each layer.
        downs, ups: a_ERI (of one shape) and b_ERO of each.
        routings: of each, alike but for the tensors in them. A choice is that of one layer alone.

    Returns:
        The choices, with an axis G in front.
    """
    choice, sorted_pairs = _sort(x_NI, routings, downs[0].shape[0], settings)
    h_GSMR = _shrink(x_NI, downs, sorted_pairs, settings)
    for g, (y_NO, b_ERO) in enumerate(zip(outputs, ups, strict=True)):
        _expand(
            y_NO,
            h_GSMR.select(0, g),
            b_ERO,
            sorted_pairs.of_layer(g),
            choice.weights_NK.shape[2],
            settings,
            write=write,
        )
    return choice


class _Sorted(NamedTuple):
    """Pairs in the order of their experts; see `sorting`. All with an axis G in front."""

    tokens_M: torch.Tensor
    weights_M: torch.Tensor
    begins: torch.Tensor
    shrink_ends_E: torch.Tensor
    expand_ends_KE: torch.Tensor

    def of_layer(self, g: int) -> _Sorted:
        return _Sorted(*(tensor.select(0, g) for tensor in self))


class _Block(NamedTuple):
    """Tokens of one program, how many it counts and places at once, and in how many steps."""

    tokens: int
    at_once: int
    steps: int


def _sort(
    x_NI: torch.Tensor, routings: Sequence[Question] | Sequence[Choice], num_experts: int, settings: Many
) -> tuple[Choice, _Sorted]:
    """(the choices, with an axis G in front; their pairs)."""
    choice, counts_GCKE, block = _choose(x_NI, routings, num_experts, settings)
    layers, num_tokens, top_k = choice.weights_NK.shape
    num_pairs, num_blocks = num_tokens * top_k, counts_GCKE.shape[1]
    new: dict[str, Any] = {"dtype": torch.int32, "device": x_NI.device}
    found = _Sorted(
        torch.empty(layers, num_pairs, **new),
        torch.empty(layers, num_pairs, dtype=torch.float32, device=x_NI.device),
        torch.empty(layers, (num_experts * top_k // 16 + 1) * 16, **new),
        torch.empty(layers, num_experts, **new),
        torch.empty(layers, top_k, num_experts, **new),
    )
    block_c = min(settings.sort_block_c, power_of_two(num_blocks))
    place_pairs[(num_blocks, layers)](
        choice.expert_ids_NK,
        choice.weights_NK,
        counts_GCKE,
        *found,
        num_tokens,
        num_experts,
        counts_GCKE.shape[3],
        num_blocks,
        block.tokens,
        block.steps,
        triton.cdiv(num_blocks, block_c),
        E_PAD=power_of_two(num_experts),
        TOP_K=top_k,
        K_PAD=power_of_two(top_k),
        BLOCK_N=block.at_once,
        BLOCK_C=block_c,
        SHRINK_ROWS=settings.shrink_rows,
        EXPAND_ROWS=settings.expand_rows,
        ONE_STEP=block.steps == 1,
        **options(settings.pdl and x_NI.is_cuda, settings.place_warps),
    )
    return choice, found


def _choose(
    x_NI: torch.Tensor, routings: Sequence[Question] | Sequence[Choice], num_experts: int, settings: Many
) -> tuple[Choice, torch.Tensor, _Block]:
    """(the choices, with an axis G in front; counts_GCKE; what one of C programs counts, and places)."""
    num_tokens, in_features = x_NI.shape
    pdl = settings.pdl and x_NI.is_cuda
    chunks = triton.cdiv(num_tokens, settings.choose_block_n)
    steps = triton.cdiv(chunks, settings.most_blocks)
    num_blocks = triton.cdiv(chunks, steps)
    tokens = steps * settings.choose_block_n
    at_once = min(settings.place_block_n, power_of_two(steps) * settings.choose_block_n)
    block = _Block(tokens, at_once, triton.cdiv(tokens, at_once))
    first = routings[0]
    if isinstance(first, Question):
        questions: Sequence[Question] = routings  # type: ignore[assignment]
        scored = score(x_NI, questions, settings.scores, pdl)
        choice = empty_choice(x_NI, len(questions), first.top_k)
    else:
        choice = Choice(first.weights_NK.unsqueeze(0), first.expert_ids_NK.unsqueeze(0))
    layers, _, top_k = choice.weights_NK.shape
    shape = (layers, num_blocks, top_k, padded(num_experts))
    counts_GCKE = torch.empty(shape, dtype=torch.int32, device=x_NI.device)
    sizes = {
        "E_PAD": power_of_two(num_experts),
        "TOP_K": top_k,
        "K_PAD": power_of_two(top_k),
        "COUNT_N": block.at_once,
        **options(pdl, settings.choose_warps),
    }
    if isinstance(first, Question):
        choose_many[(num_blocks, layers)](
            *scored,
            *per_layer(questions),
            choice.weights_NK,
            choice.expert_ids_NK,
            counts_GCKE,
            num_tokens,
            num_experts,
            in_features,
            padded(num_experts),
            bias_stride(first),
            first.eps,
            first.temperature,
            steps,
            block.steps,
            LAYERS=layers,
            BLOCK_N=settings.choose_block_n,
            SPLITS=settings.scores.splits,
            HAS_BIAS=first.bias_NE is not None,
            **sizes,
        )
    else:
        rows = (num_tokens, padded(num_experts), block.tokens, block.steps)
        count_pairs[(num_blocks,)](choice.expert_ids_NK, counts_GCKE, *rows, **sizes)
    return choice, counts_GCKE, block


def _shrink(x_NI: torch.Tensor, downs: Sequence[torch.Tensor], sorted_pairs: _Sorted, settings: Many) -> torch.Tensor:
    """h_GSMR: weight * (A x) of sorted pairs, fp32."""
    (layers, num_pairs), (num_experts, rank, in_features) = sorted_pairs.tokens_M.shape, downs[0].shape
    h_GSMR = x_NI.new_empty(layers, settings.shrink_splits, num_pairs, rank, dtype=torch.float32)
    tiles = _most_tiles(num_pairs, num_experts, settings.shrink_rows)
    shrink_many[(tiles, settings.shrink_splits, layers)](
        x_NI,
        *three(downs),
        sorted_pairs.tokens_M,
        sorted_pairs.weights_M,
        sorted_pairs.begins,
        sorted_pairs.shrink_ends_E,
        h_GSMR,
        num_pairs,
        num_experts,
        in_features,
        rank,
        x_NI.stride(0),
        LAYERS=layers,
        E_PAD=power_of_two(num_experts),
        TOP_K=sorted_pairs.expand_ends_KE.shape[1],
        R_PAD=max(16, power_of_two(rank)),
        ROWS=settings.shrink_rows,
        BLOCK_I=settings.shrink_block_i,
        STEPS=steps_of(in_features, settings.shrink_block_i, settings.shrink_splits),
        UPCAST=not x_NI.is_cuda,
        **options(settings.pdl and x_NI.is_cuda, settings.shrink_warps, settings.shrink_stages),
    )
    return h_GSMR


def _expand(
    y_NO: torch.Tensor,
    h_SMR: torch.Tensor,
    b_ERO: torch.Tensor,
    sorted_pairs: _Sorted,
    top_k: int,
    settings: Many,
    *,
    write: bool,
) -> None:
    """y_NO += B h of one layer; with `write` y_NO = B h."""
    num_tokens, (num_experts, rank, out_features) = y_NO.shape[0], b_ERO.shape
    tiles = _most_tiles(num_tokens, num_experts, settings.expand_rows)
    ranges = _columns(num_tokens * y_NO.element_size(), out_features, settings)
    blocks = blocks_a_program(tiles, triton.cdiv(ranges[0][1], settings.expand_block_o), settings)
    for first_o, last_o in ranges:
        for slot in range(top_k):
            expand_many[(tiles, triton.cdiv(last_o - first_o, settings.expand_block_o * blocks))](
                y_NO,
                h_SMR,
                b_ERO,
                sorted_pairs.tokens_M,
                sorted_pairs.begins,
                sorted_pairs.expand_ends_KE,
                slot,
                first_o,
                last_o,
                h_SMR.shape[1],
                num_experts,
                out_features,
                rank,
                y_NO.stride(0),
                SPLITS=settings.shrink_splits,
                E_PAD=power_of_two(num_experts),
                TOP_K=top_k,
                R_PAD=max(16, power_of_two(rank)),
                ROWS=settings.expand_rows,
                BLOCK_O=settings.expand_block_o,
                BLOCKS=blocks,
                WRITE=write and slot == 0,
                UPCAST=not y_NO.is_cuda,
                **options(settings.pdl and y_NO.is_cuda, settings.expand_warps),
            )


def blocks_a_program(tiles: int, blocks: int, settings: Many) -> int:
    """Blocks of columns (a power of two) that one program takes, where four programs a multiprocessor remain."""
    most = max(1, tiles * blocks // (4 * PROGRAMS))
    return min(settings.expand_blocks, power_of_two(most + 1) // 2)


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
