"""Registered operators that choose experts and add their updates; see `triton.py`.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from phatgoose.kernels.dispatch import (
    MOST_TOP_K,
    launch,
    launch_with_bases,
    mix_with_torch,
    route_with_torch,
    with_bases,
)


@torch.library.custom_op("phatgoose::route_and_add_", mutates_args={"y_NO"})
def route_and_add_(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    halves_HPI: torch.Tensor,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts for each token and add their updates to y_NO.

    The scores are prototypes times standardised activations plus bias; the
    weights a softmax over the best `top_k`. Of equal scores the lower expert id
    wins on CUDA; torch.topk, used elsewhere, promises no order.

    Args:
        y_NO: the base layer's output, any float dtype, rows without gaps.
        x_NI, a_ERI, b_ERO: see `mix_loras`; all of one dtype.
        halves_HPI, sums_E: see `phatgoose.kernels.prototypes`.
        bias_NE: added to the scores, fp32; one row counts for all tokens. -inf forbids an expert.
        top_k: experts per token.
        eps: added to the variance of the activations.
        temperature: divides the scores before the softmax.

    Returns:
        (weights_NK in fp32, expert_ids_NK in int64).
    """
    weights_NK, expert_ids_NK = route_with_torch(x_NI, halves_HPI, len(a_ERI), bias_NE, top_k, eps, temperature)
    y_NO += mix_with_torch(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
    return weights_NK, expert_ids_NK


@torch.library.custom_op("phatgoose::routed_linear", mutates_args=())
def routed_linear(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    halves_HPI: torch.Tensor,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear layer and `route_and_add_`; in CUDA graphs and for few tokens at the same time.

    Args:
        weight_OI, bias_O: the base layer's.

    Returns:
        (y_NO, weights_NK in fp32, expert_ids_NK in int64).
    """
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    weights_NK, expert_ids_NK = route_and_add_(
        y_NO, x_NI, a_ERI, b_ERO, halves_HPI, sums_E, bias_NE, top_k, eps, temperature
    )
    return y_NO, weights_NK, expert_ids_NK


@route_and_add_.register_kernel("cuda")
def route_and_add_on_cuda(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    halves_HPI: torch.Tensor,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `route_and_add_` does on CUDA."""
    if top_k > MOST_TOP_K:
        weights_NK, expert_ids_NK = route_with_torch(x_NI, halves_HPI, len(a_ERI), bias_NE, top_k, eps, temperature)
        y_NO += mix_with_torch(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
        return weights_NK, expert_ids_NK
    from phatgoose.kernels.launches import Question

    if bias_NE is not None:
        bias_NE = bias_NE.float().contiguous()
    choice = launch(y_NO, x_NI, a_ERI, b_ERO, Question(halves_HPI, sums_E, bias_NE, top_k, eps, temperature))
    return choice.weights_NK, choice.expert_ids_NK


@routed_linear.register_kernel("cuda")
def routed_linear_on_cuda(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    halves_HPI: torch.Tensor,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `routed_linear` does on CUDA."""
    from phatgoose.kernels import launches

    if not with_bases(x_NI, [bias_O], top_k):
        y_NO = F.linear(x_NI, weight_OI, bias_O)
        weights_NK, expert_ids_NK = route_and_add_on_cuda(
            y_NO, x_NI, a_ERI, b_ERO, halves_HPI, sums_E, bias_NE, top_k, eps, temperature
        )
        return y_NO, weights_NK, expert_ids_NK
    question = launches.Question(
        halves_HPI, sums_E, None if bias_NE is None else bias_NE.float().contiguous(), top_k, eps, temperature
    )
    (y_NO,), choice = launch_with_bases(x_NI, [(weight_OI, bias_O)], [a_ERI], [b_ERO], [question])
    return y_NO, *choice.of_layer(0)


@route_and_add_.register_fake
def _(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    halves_HPI: torch.Tensor,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (x_NI.shape[0], top_k)
    return x_NI.new_empty(shape, dtype=torch.float32), x_NI.new_empty(shape, dtype=torch.int64)


@routed_linear.register_fake
def _(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    halves_HPI: torch.Tensor,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (x_NI.shape[0], top_k)
    weights_NK, expert_ids_NK = x_NI.new_empty(shape, dtype=torch.float32), x_NI.new_empty(shape, dtype=torch.int64)
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]), weights_NK, expert_ids_NK
