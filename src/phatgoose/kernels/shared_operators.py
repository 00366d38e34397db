"""Registered operators that do for two or three layers of one x what those of `routing_operators.py` do for one.

Axes: G layers, N tokens, E experts, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from phatgoose.kernels.dispatch import (
    MOST_TOP_K,
    check,
    check_rows,
    check_shared,
    is_hopper,
    launch_with_bases,
    with_bases,
)
from phatgoose.kernels.routing_operators import route_and_add_

if TYPE_CHECKING:
    from phatgoose.kernels.launches import Question

_Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


@torch.library.custom_op("phatgoose::route_and_add_shared_", mutates_args={"outputs"})
def route_and_add_shared_(
    outputs: list[torch.Tensor],
    x_NI: torch.Tensor,
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_and_add_` for two or three layers of one x; on CUDA in the launches of one, but for many tokens' B.

    Args:
        outputs: y_NO of each layer, all of one dtype.
        downs, ups: a_ERI, all of one shape, and b_ERO of each.
        halves, sums: halves_HPI and sums_E of each; see `phatgoose.kernels.prototypes`.
        biases: bias_NE of each, all of one shape.

    Returns:
        (weights_GNK in fp32, expert_ids_GNK in int64).
    """
    return _one_by_one(outputs, x_NI, _layers(downs, ups, halves, sums, biases), top_k, eps, temperature)


@torch.library.custom_op("phatgoose::routed_linears", mutates_args=())
def routed_linears(
    x_NI: torch.Tensor,
    weights: list[torch.Tensor],
    offsets: list[torch.Tensor | None],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Two or three linear layers of one x and `route_and_add_shared_`; in CUDA graphs and for few tokens at once.

    Args:
        weights, offsets: weight_OI and bias_O of each base layer, all of one dtype.

    Returns:
        (y_NO of each, weights_GNK in fp32, expert_ids_GNK in int64).
    """
    outputs = _linears(x_NI, weights, offsets)
    rule = (top_k, eps, temperature)
    return outputs, *route_and_add_shared_(outputs, x_NI, downs, ups, halves, sums, biases, *rule)


@route_and_add_shared_.register_kernel("cuda")
def route_and_add_shared_on_cuda(
    outputs: list[torch.Tensor],
    x_NI: torch.Tensor,
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `route_and_add_shared_` does on CUDA."""
    from phatgoose.kernels import launches, settings, sorted_launches

    num_tokens, in_features = x_NI.shape
    layers = _layers(downs, ups, halves, sums, biases)
    if num_tokens == 0 or top_k > MOST_TOP_K:
        return _one_by_one(outputs, x_NI, layers, top_k, eps, temperature)
    questions = _questions(layers, top_k, eps, temperature)
    for a_ERI, b_ERO, question in zip(downs, ups, questions, strict=True):
        check(x_NI, a_ERI, b_ERO, question)
    check_shared(outputs, downs, biases)
    for y_NO in outputs:
        check_rows(y_NO)
    num_experts = downs[0].shape[0]
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    downs, ups = [a_ERI.contiguous() for a_ERI in downs], [b_ERO.contiguous() for b_ERO in ups]
    with torch.cuda.device(x_NI.device):
        hopper = is_hopper(x_NI)
        if settings.takes_few(num_tokens, top_k):
            few = settings.few(num_tokens, num_experts, in_features, len(layers), hopper=hopper)
            choice = launches.add_few_shared(outputs, x_NI, downs, ups, questions, few)
        else:
            many = settings.many(num_tokens, top_k, num_experts, in_features, len(layers), hopper=hopper)
            choice = sorted_launches.add_many_shared(outputs, x_NI, downs, ups, questions, many)
    return choice.weights_NK, choice.expert_ids_NK


@routed_linears.register_kernel("cuda")
def routed_linears_on_cuda(
    x_NI: torch.Tensor,
    weights: list[torch.Tensor],
    offsets: list[torch.Tensor | None],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """What `routed_linears` does on CUDA."""
    rule = (top_k, eps, temperature)
    if not with_bases(x_NI, offsets, top_k):
        outputs = _linears(x_NI, weights, offsets)
        return outputs, *route_and_add_shared_on_cuda(outputs, x_NI, downs, ups, halves, sums, biases, *rule)
    check_shared(weights, downs, biases)
    questions = _questions(_layers(downs, ups, halves, sums, biases), *rule)
    bases = list(zip(weights, offsets, strict=True))
    outputs, choice = launch_with_bases(x_NI, bases, downs, ups, questions)
    return outputs, *choice


@route_and_add_shared_.register_fake
def _(
    outputs: list[torch.Tensor],
    x_NI: torch.Tensor,
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(outputs), x_NI.shape[0], top_k)
    return x_NI.new_empty(shape, dtype=torch.float32), x_NI.new_empty(shape, dtype=torch.int64)


@routed_linears.register_fake
def _(
    x_NI: torch.Tensor,
    weights: list[torch.Tensor],
    offsets: list[torch.Tensor | None],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    shape = (len(weights), x_NI.shape[0], top_k)
    outputs = [x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]) for weight_OI in weights]
    return outputs, x_NI.new_empty(shape, dtype=torch.float32), x_NI.new_empty(shape, dtype=torch.int64)


def _linears(x_NI: torch.Tensor, weights: list[torch.Tensor], offsets: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The base layers' outputs."""
    return [F.linear(x_NI, weight_OI, bias_O) for weight_OI, bias_O in zip(weights, offsets, strict=True)]


def _one_by_one(
    outputs: list[torch.Tensor], x_NI: torch.Tensor, layers: list[_Layer], top_k: int, eps: float, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`route_and_add_` of each; the choices with an axis G in front."""
    found = [
        route_and_add_(y_NO, x_NI, *layer, top_k, eps, temperature) for y_NO, layer in zip(outputs, layers, strict=True)
    ]
    weights, expert_ids = zip(*found, strict=True)
    return torch.stack(weights), torch.stack(expert_ids)


def _questions(layers: list[_Layer], top_k: int, eps: float, temperature: float) -> list[Question]:
    """What the kernels ask for each layer."""
    from phatgoose.kernels import launches

    return [
        launches.Question(halves_HPI, sums_E, bias_NE.float().contiguous(), top_k, eps, temperature)
        for _, _, halves_HPI, sums_E, bias_NE in layers
    ]


def _layers(
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    halves: list[torch.Tensor],
    sums: list[torch.Tensor],
    biases: list[torch.Tensor],
) -> list[_Layer]:
    """What each layer has, in the order of `route_and_add_`."""
    return list(zip(downs, ups, halves, sums, biases, strict=True))
