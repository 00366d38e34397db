"""Launches of the Triton kernels for many tokens: route, sort, shrink, expand.

Axes: G layers of one x, N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S splits of I,
M = N * K pairs, T tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton

from phatgoose.kernels.launches import Choice, Question, bias_stride, empty_choice, options, per_layer, steps_of, three
from phatgoose.kernels.many_scores import score_many
from phatgoose.kernels.many_tokens import expand_many, shrink_many
from phatgoose.kernels.prototypes import padded
from phatgoose.kernels.settings import Many, power_of_two
from phatgoose.kernels.sorting import choose_many, place_pairs


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
    choice, ids_GKN, unweighted = _choose(x_NI, routings, settings)
    pairs = sort_pairs(ids_GKN, len(x_NI), len(downs[0]), settings)
    h_GSMR = _shrink(x_NI, downs, choice.weights_NK, unweighted, pairs, settings)
    for g, (y_NO, b_ERO) in enumerate(zip(outputs, ups, strict=True)):
        _expand(y_NO, h_GSMR.select(0, g), b_ERO, pairs.of_layer(g), settings, write=write)
    return choice


class Sorted(NamedTuple):
    """Pairs in the order of their experts, and the tiles that they are cut into; see `sorting`. All with an axis G."""

    pairs_M: torch.Tensor
    shrink_tiles_3T: torch.Tensor
    expand_tiles_K3T: torch.Tensor

    def of_layer(self, g: int) -> Sorted:
        """One layer's, of several."""
        return Sorted(*(tensor.select(0, g) for tensor in self))


class Unweighted(NamedTuple):
    """What weights will be made of; see `sorting.choose_many` and `many_tokens.shrink_many`."""

    scores_GNK: torch.Tensor
    means_N2: torch.Tensor
    eps: float
    temperature: float


def _choose(
    x_NI: torch.Tensor, routings: Sequence[Question] | Sequence[Choice], settings: Many
) -> tuple[Choice, torch.Tensor, Unweighted | None]:
    """(the choices, with an axis G in front; the expert ids again, as `narrow_ids`; what weights still need)."""
    first = routings[0]
    if isinstance(first, Choice):
        choice = Choice(first.weights_NK.unsqueeze(0), first.expert_ids_NK.unsqueeze(0))
        return choice, narrow_ids(choice.expert_ids_NK), None
    questions: Sequence[Question] = routings  # type: ignore[assignment]
    (num_tokens, in_features), num_experts = x_NI.shape, len(first.sums_E)
    scored = score_many(x_NI, questions, settings)
    choice = empty_choice(x_NI, len(questions), first.top_k)
    ids_GKN = x_NI.new_empty(len(questions), first.top_k, padded(num_tokens), dtype=torch.int32)
    stats_SN2, unweighted, written = scored.stats_SN2, None, choice.weights_NK
    if stats_SN2 is None and settings.weigh_late:
        means_N2 = x_NI.new_empty(num_tokens, 2, dtype=torch.float32)
        unweighted = Unweighted(torch.empty_like(choice.weights_NK), means_N2, first.eps, first.temperature)
        written = unweighted.scores_GNK
    block_i = min(2048, power_of_two(in_features))
    choose_many[(num_tokens,)](
        x_NI,
        scored.dots,
        scored.dots if stats_SN2 is None else stats_SN2,
        scored.dots if unweighted is None else unweighted.means_N2,
        *per_layer(questions),
        written,
        choice.expert_ids_NK,
        ids_GKN,
        num_tokens,
        num_experts,
        in_features,
        x_NI.stride(0),
        *scored.strides,
        bias_stride(first),
        ids_GKN.shape[2],
        first.eps,
        first.temperature,
        LAYERS=len(questions),
        PARTS=scored.parts,
        SPLITS=0 if stats_SN2 is None else len(stats_SN2),
        BLOCK_I=block_i,
        STEPS=triton.cdiv(in_features, block_i),
        E_PAD=power_of_two(num_experts),
        TOP_K=first.top_k,
        K_PAD=power_of_two(first.top_k),
        HAS_BIAS=first.bias_NE is not None,
        LATE=unweighted is not None,
        num_warps=1,
    )
    return choice, ids_GKN, unweighted


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
    found = Sorted(
        ids_GKN.new_empty(layers, num_tokens * top_k),
        ids_GKN.new_empty(layers, 3, shrink_tiles),
        ids_GKN.new_empty(layers, top_k, 3, expand_tiles),
    )
    block_n = min(settings.place_block_n, power_of_two(num_tokens))
    steps = triton.cdiv(num_tokens, block_n)
    place_pairs[(num_experts, layers)](
        ids_GKN,
        *found,
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
    return found


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
        for slot in range(top_k):
            expand_many[(num_tiles, triton.cdiv(last_o - first_o, settings.expand_block_o))](
                y_NO,
                h_SMR,
                b_ERO,
                sorted_pairs.pairs_M,
                sorted_pairs.expand_tiles_K3T,
                slot,
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
                WRITE=write and slot == 0,
                UPCAST=not y_NO.is_cuda,
                **options(settings.pdl and y_NO.is_cuda, settings.expand_warps),
            )


def _columns(bytes_a_column: int, out_features: int, settings: Many) -> list[tuple[int, int]]:
    """Ranges of columns of about `expand_bytes`, alike but for the last one."""
    blocks = triton.cdiv(out_features, settings.expand_block_o)
    ranges = triton.cdiv(bytes_a_column * out_features, settings.expand_bytes)
    width = triton.cdiv(blocks, min(ranges, blocks)) * settings.expand_block_o
    return [(first, min(first + width, out_features)) for first in range(0, out_features, width)]


def _most_tiles(pairs: int, num_experts: int, rows: int) -> int:
    """Tiles that `sorting.place_pairs` numbers."""
    return pairs // rows + num_experts
