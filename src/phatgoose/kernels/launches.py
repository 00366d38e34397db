"""Launches of the Triton kernels for few tokens, and what the others share.

They allocate what lies between the kernels and set grids from shapes. Nothing waits for the device.

On CPU tensors (under TRITON_INTERPRET=1 only) operands are widened before products; see `scoring.product`.

Axes: G layers of one x, N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S splits of I,
M = N * K pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton

from phatgoose.kernels.few_tokens import expand_few, shrink_few
from phatgoose.kernels.prototypes import rows_for
from phatgoose.kernels.scoring import partial_scores
from phatgoose.kernels.settings import EXPAND_TILE, SHRINK_TILE, Few, Scores, power_of_two

T = TypeVar("T")


class Question(NamedTuple):
    """What the choice of experts depends on, beside x.

    Attributes:
        halves_HPI, sums_E: see `phatgoose.kernels.prototypes`.
        bias_NE: added to the scores, fp32; one row counts for all tokens. None for nothing.
        top_k: experts per token.
        eps: added to the variance of x.
        temperature: divides the scores before the softmax.
    """

    halves_HPI: torch.Tensor
    sums_E: torch.Tensor
    bias_NE: torch.Tensor | None
    top_k: int
    eps: float
    temperature: float


class Choice(NamedTuple):
    """weights_NK (fp32), expert_ids_NK (int64). Launches for several layers write (G, N, K)."""

    weights_NK: torch.Tensor
    expert_ids_NK: torch.Tensor

    def of_layer(self, g: int) -> Choice:
        """One layer's, of several."""
        return Choice(self.weights_NK.select(0, g), self.expert_ids_NK.select(0, g))


def score(
    x_NI: torch.Tensor,
    questions: Sequence[Question],
    settings: Scores,
    pdl: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dots_GSNE, with rows of `rows_for` numbers, and stats_SN2), fp32, for the questions of up to three layers."""
    (num_tokens, in_features), (num_halves, stride_e, _) = x_NI.shape, questions[0].halves_HPI.shape
    num_experts = len(questions[0].sums_E)
    dots_GSNE = x_NI.new_empty(len(questions), settings.splits, num_tokens, stride_e, dtype=torch.float32)
    stats_SN2 = x_NI.new_empty(settings.splits, num_tokens, 2, dtype=torch.float32)
    grid = (
        triton.cdiv(num_tokens, settings.block_n),
        triton.cdiv(num_experts, settings.block_e) * len(questions) + 1,
        settings.splits,
    )
    partial_scores[grid](
        x_NI,
        *three([question.halves_HPI for question in questions]),
        dots_GSNE,
        stats_SN2,
        num_tokens,
        num_experts,
        in_features,
        x_NI.stride(0),
        stride_e,
        LAYERS=len(questions),
        BLOCK_N=settings.block_n,
        BLOCK_E=settings.block_e,
        BLOCK_I=settings.block_i,
        STEPS=steps_of(in_features, settings.block_i, settings.splits),
        HAS_LO=num_halves == 2,
        UPCAST=not x_NI.is_cuda,
        **options(pdl and x_NI.is_cuda, settings.warps, settings.stages),
    )
    return dots_GSNE, stats_SN2


def shrink(
    x_NI: torch.Tensor,
    factors: Sequence[torch.Tensor],
    routings: Sequence[Question] | Sequence[Choice],
    settings: Few,
) -> tuple[torch.Tensor, Choice]:
    """(h_GSNKR, fp32, times the routing weights; the choice, with an axis G in front). Few tokens.

    Args:
        factors: a_ERI of up to three layers.
        routings: of each; questions are answered first. Choices are those of one layer.
    """
    (num_tokens, in_features), (num_experts, rank, _) = x_NI.shape, factors[0].shape
    pdl = settings.pdl and x_NI.is_cuda
    first = routings[0]
    if isinstance(first, Question):
        questions: Sequence[Question] = routings  # type: ignore[assignment]
        dots_GSNE, stats_SN2 = score(x_NI, questions, settings.scores, pdl)
        choice = empty_choice(x_NI, len(questions), first.top_k)
        read = (dots_GSNE, stats_SN2, *per_layer(questions))
        splits, eps, temperature, has_bias = (
            settings.scores.splits,
            first.eps,
            first.temperature,
            first.bias_NE is not None,
        )
    else:
        choice = Choice(first.weights_NK.unsqueeze(0), first.expert_ids_NK.unsqueeze(0))
        read, splits = (choice.weights_NK,) * 8, 1
        eps, temperature, has_bias = 0.0, 1.0, False
    top_k = choice.weights_NK.shape[2]
    k_pad, r_pad = power_of_two(top_k), power_of_two(rank)
    block_i = max(16, min(settings.shrink_block_i, SHRINK_TILE * settings.shrink_warps // (k_pad * r_pad)))
    h_GSNKR = x_NI.new_empty(len(factors), settings.shrink_splits, num_tokens, top_k, rank, dtype=torch.float32)
    shrink_few[(num_tokens, settings.shrink_splits, len(factors))](
        x_NI,
        *read,
        *three(factors),
        choice.weights_NK,
        choice.expert_ids_NK,
        h_GSNKR,
        num_tokens,
        num_experts,
        in_features,
        rank,
        x_NI.stride(0),
        rows_for(num_experts),
        bias_stride(first),
        eps,
        temperature,
        LAYERS=len(factors),
        SPLITS=splits,
        E_PAD=power_of_two(num_experts),
        TOP_K=top_k,
        K_PAD=k_pad,
        R_PAD=r_pad,
        BLOCK_I=block_i,
        STEPS=steps_of(in_features, block_i, settings.shrink_splits),
        HAS_BIAS=has_bias,
        ROUTE=isinstance(first, Question),
        **options(pdl, settings.shrink_warps),
    )
    return h_GSNKR, choice


def expand(
    outputs: Sequence[torch.Tensor],
    h_GSNKR: torch.Tensor,
    factors: Sequence[torch.Tensor],
    expert_ids_GNK: torch.Tensor,
    settings: Few,
) -> None:
    """Outputs += the updates of few tokens.

    Args:
        outputs: y_NO of each layer, of one dtype.
        factors: b_ERO of each.
    """
    _, splits, num_tokens, top_k, rank = h_GSNKR.shape
    widths, r_pad = [y_NO.shape[1] for y_NO in outputs], power_of_two(rank)
    block_o = max(32, min(settings.expand_block_o, EXPAND_TILE * settings.expand_warps // r_pad))
    expand_few[(num_tokens, triton.cdiv(max(widths), block_o), len(outputs))](
        *three(outputs),
        h_GSNKR,
        *three(factors),
        expert_ids_GNK,
        num_tokens,
        *three(widths),
        rank,
        *three([y_NO.stride(0) for y_NO in outputs]),
        LAYERS=len(outputs),
        SPLITS=splits,
        TOP_K=top_k,
        R_PAD=r_pad,
        BLOCK_O=block_o,
        **options(settings.pdl and outputs[0].is_cuda, settings.expand_warps),
    )


def add_few(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    routing: Question | Choice,
    settings: Few,
) -> Choice:
    """y_NO += the chosen experts' updates of x_NI, for few tokens."""
    routings: Any = [routing]
    h_GSNKR, choice = shrink(x_NI, [a_ERI], routings, settings)
    expand([y_NO], h_GSNKR, [b_ERO], choice.expert_ids_NK, settings)
    return choice.of_layer(0)


def add_few_shared(
    outputs: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    questions: Sequence[Question],
    settings: Few,
) -> Choice:
    """What `add_few` does, for two or three layers of one x in the launches of one.

    Args:
        outputs: y_NO of each layer.
        downs, ups: a_ERI (of one shape) and b_ERO of each.
        questions: of each, alike but for the tensors in them.

    Returns:
        The choices, with an axis G in front.
    """
    h_GSNKR, choice = shrink(x_NI, downs, questions, settings)
    expand(outputs, h_GSNKR, ups, choice.expert_ids_NK, settings)
    return choice


def linears_and_add(
    x_NI: torch.Tensor,
    bases: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    questions: Sequence[Question],
    settings: Few,
) -> tuple[list[torch.Tensor], Choice]:
    """(the outputs of up to three layers of one x, the choices with an axis G in front), for few tokens.

    The base layers run at the same time as routing and A, on another stream (in a captured graph: another branch). With
    `pdl` they are launched first, and with priority: they read the most, and what they leave of a GPU is enough for the
    rest. Without it that would be slower (docs/performance.md).
    All memory is this stream's: the other one waits for it first, and it for the other one before B.

    Args:
        bases: weight_OI and bias_O of each layer.
        downs, ups, questions: see `add_few_shared`.
    """
    main = torch.cuda.current_stream(x_NI.device)
    stream = torch.cuda.Stream(x_NI.device, priority=-1 if settings.pdl else 0)
    stream.wait_stream(main)
    outputs = [x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]) for weight_OI, _ in bases]
    if settings.pdl:
        _linears(outputs, x_NI, bases, stream)
    h_GSNKR, choice = shrink(x_NI, downs, questions, settings)
    if not settings.pdl:
        _linears(outputs, x_NI, bases, stream)
    main.wait_stream(stream)
    expand(outputs, h_GSNKR, ups, choice.expert_ids_NK, settings)
    return outputs, choice


def _linears(
    outputs: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    bases: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    stream: torch.cuda.Stream,
) -> None:
    """Write the outputs of layers with these weight_OI and bias_O, on a stream."""
    with torch.cuda.stream(stream):
        for y_NO, (weight_OI, bias_O) in zip(outputs, bases, strict=True):
            if bias_O is None:
                torch.mm(x_NI, weight_OI.T, out=y_NO)
            else:
                torch.addmm(bias_O, x_NI, weight_OI.T, out=y_NO)


def empty_choice(x_NI: torch.Tensor, layers: int, top_k: int) -> Choice:
    """A choice to be written, with an axis G in front."""
    return Choice(
        x_NI.new_empty(layers, x_NI.shape[0], top_k, dtype=torch.float32),
        x_NI.new_empty(layers, x_NI.shape[0], top_k, dtype=torch.int64),
    )


def per_layer(questions: Sequence[Question]) -> tuple[torch.Tensor, ...]:
    """What `scoring.choose` reads of three layers: sums, then biases (if there is none, the sums, unread)."""
    biases = [question.sums_E if question.bias_NE is None else question.bias_NE for question in questions]
    return *three([question.sums_E for question in questions]), *three(biases)


def three(arguments: Sequence[T]) -> tuple[T, T, T]:
    """The arguments of one to three layers as kernels take them."""
    return arguments[0], arguments[min(1, len(arguments) - 1)], arguments[-1]


def bias_stride(routing: Question | Choice) -> int:
    """Elements from one token's bias to the next's."""
    if isinstance(routing, Choice) or routing.bias_NE is None or routing.bias_NE.shape[0] == 1:
        return 0
    return routing.bias_NE.stride(0)


def steps_of(in_features: int, block_i: int, splits: int) -> int:
    """Blocks of I in a split."""
    return int(triton.cdiv(triton.cdiv(in_features, block_i), splits))


def options(pdl: bool, warps: int, stages: int | None = None) -> Mapping[str, Any]:
    """Launch options; the kernel's own PDL goes with the launch's."""
    options: dict[str, Any] = {"PDL": pdl, "num_warps": warps}
    if pdl:
        options["launch_pdl"] = True
    if stages is not None:
        options["num_stages"] = stages
    return options
