"""Registered operators: Triton kernels on CUDA, the PyTorch backends elsewhere.

`torch.ops.phatgoose.route_and_add_` routes and mixes, `add_loras_` and `mix_loras`
mix. They have fake implementations, wait for nothing on the host and allocate by
shapes alone, so they go through torch.compile(fullgraph=True) and CUDA graphs.
A trailing underscore: adds into its first argument.

On other devices an operator is what `phatgoose.kernels.choose` says; so it is on
CUDA for more than 8 experts per token. Only `mix_loras` has a gradient; the
others are for inference (see `phatgoose.kernels.add_loras`).

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from phatgoose.kernels import choose, load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the kernels unroll their loop over the chosen experts
MOST_TOP_K = 8


@torch.library.custom_op("phatgoose::mix_loras", mutates_args=())
def mix_loras(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    return _mix(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK).clone()


@torch.library.custom_op("phatgoose::add_loras_", mutates_args={"y_NO"})
def add_loras_(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> None:
    """y_NO += `mix_loras`. y_NO of any float dtype, rows without gaps."""
    y_NO += _mix(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)


@torch.library.custom_op("phatgoose::route_and_add_", mutates_args={"y_NO"})
def route_and_add_(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
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
        hi_EI, lo_EI, sums_E: see `phatgoose.kernels.prototypes`.
        bias_NE: added to the scores, fp32; one row counts for all tokens. -inf forbids an expert.
        top_k: experts per token.
        eps: added to the variance of the activations.
        temperature: divides the scores before the softmax.

    Returns:
        (weights_NK in fp32, expert_ids_NK in int64).
    """
    weights_NK, expert_ids_NK = _route(x_NI, hi_EI, lo_EI, bias_NE, top_k, eps, temperature)
    y_NO += _mix(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
    return weights_NK, expert_ids_NK


@torch.library.custom_op("phatgoose::routed_linear", mutates_args=())
def routed_linear(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A linear layer and `route_and_add_`; on CUDA and for few tokens at the same time.

    Args:
        weight_OI, bias_O: the base layer's.

    Returns:
        (y_NO, weights_NK in fp32, expert_ids_NK in int64).
    """
    y_NO = F.linear(x_NI, weight_OI, bias_O)
    weights_NK, expert_ids_NK = route_and_add_(
        y_NO, x_NI, a_ERI, b_ERO, hi_EI, lo_EI, sums_E, bias_NE, top_k, eps, temperature
    )
    return y_NO, weights_NK, expert_ids_NK


def _mix(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, w_NK: torch.Tensor, ids_NK: torch.Tensor) -> Any:
    backend = choose(x_NI.shape[0], ids_NK.shape[1], a_ERI.shape[0], a_ERI.shape[1])
    return load(backend)(x_NI, a_ERI, b_ERO, w_NK, ids_NK)


def _route(
    x_NI: torch.Tensor,
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    prototypes_EI = hi_EI.float() if lo_EI is None else hi_EI.float() + lo_EI.float()
    scores_NE = F.layer_norm(x_NI.float(), x_NI.shape[-1:], eps=eps) @ prototypes_EI.T
    if bias_NE is not None:
        scores_NE = scores_NE + bias_NE
    top_NK, expert_ids_NK = torch.topk(scores_NE, top_k, dim=-1)
    return torch.softmax(top_NK / temperature, dim=-1).nan_to_num(0.0), expert_ids_NK


@mix_loras.register_kernel("cuda")
def _(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    y_NO = x_NI.new_zeros(x_NI.shape[0], b_ERO.shape[2])
    _add_cuda(y_NO, x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
    return y_NO


@add_loras_.register_kernel("cuda")
def _add_cuda(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> None:
    if expert_ids_NK.shape[1] > MOST_TOP_K:
        y_NO += _mix(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
        return
    from phatgoose.kernels.launches import Choice

    _launch(y_NO, x_NI, a_ERI, b_ERO, Choice(weights_NK.contiguous(), expert_ids_NK.contiguous()))


@route_and_add_.register_kernel("cuda")
def _(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    if top_k > MOST_TOP_K:
        weights_NK, expert_ids_NK = _route(x_NI, hi_EI, lo_EI, bias_NE, top_k, eps, temperature)
        y_NO += _mix(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
        return weights_NK, expert_ids_NK
    from phatgoose.kernels.launches import Question

    if bias_NE is not None:
        bias_NE = bias_NE.float().contiguous()
    choice = _launch(y_NO, x_NI, a_ERI, b_ERO, Question(hi_EI, lo_EI, sums_E, bias_NE, top_k, eps, temperature))
    return choice.weights_NK, choice.expert_ids_NK


@routed_linear.register_kernel("cuda")
def _(
    x_NI: torch.Tensor,
    weight_OI: torch.Tensor,
    bias_O: torch.Tensor | None,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from phatgoose.kernels import launches, settings

    num_tokens, in_features = x_NI.shape
    if num_tokens == 0 or top_k > MOST_TOP_K or not settings.takes_few(num_tokens, top_k):
        y_NO = F.linear(x_NI, weight_OI, bias_O)
        weights_NK, expert_ids_NK = route_and_add_(
            y_NO, x_NI, a_ERI, b_ERO, hi_EI, lo_EI, sums_E, bias_NE, top_k, eps, temperature
        )
        return y_NO, weights_NK, expert_ids_NK
    question = launches.Question(
        hi_EI, lo_EI, sums_E, None if bias_NE is None else bias_NE.float().contiguous(), top_k, eps, temperature
    )
    x_NI = x_NI.contiguous()
    _check(x_NI, a_ERI, b_ERO, question)
    few = settings.few(num_tokens, a_ERI.shape[0], in_features)
    with torch.cuda.device(x_NI.device):
        y_NO, choice = launches.linear_and_add(
            x_NI, weight_OI, bias_O, a_ERI.contiguous(), b_ERO.contiguous(), question, few
        )
    return y_NO, choice.weights_NK, choice.expert_ids_NK


def _check(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Any) -> None:
    """What kernels would not notice."""
    if x_NI.dtype not in DTYPES or not x_NI.dtype == a_ERI.dtype == b_ERO.dtype:
        raise TypeError(f"x, a and b must share one of {DTYPES}, got {x_NI.dtype}, {a_ERI.dtype}, {b_ERO.dtype}")
    if hasattr(routing, "hi_EI") and routing.hi_EI.dtype != x_NI.dtype:
        raise TypeError(f"prototypes are in {routing.hi_EI.dtype}, activations in {x_NI.dtype}")


def _launch(y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Any) -> Any:
    """Check what kernels would not notice, then launch."""
    # triton is imported here: the operators exist without it
    from phatgoose.kernels import launches, settings, sorted_launches

    _check(x_NI, a_ERI, b_ERO, routing)
    if y_NO.stride(1) != 1:
        raise ValueError(f"the rows of y have gaps (strides {y_NO.stride()})")
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    a_ERI, b_ERO = a_ERI.contiguous(), b_ERO.contiguous()
    (num_tokens, in_features), num_experts = x_NI.shape, a_ERI.shape[0]
    asks = isinstance(routing, launches.Question)
    top_k = routing.top_k if asks else routing.weights_NK.shape[1]
    if num_tokens == 0:
        return launches.empty_choice(x_NI, top_k) if asks else routing
    with torch.cuda.device(x_NI.device):
        if settings.takes_few(num_tokens, top_k):
            few = settings.few(num_tokens, num_experts, in_features)
            return launches.add_few(y_NO, x_NI, a_ERI, b_ERO, routing, few)
        many = settings.many(num_tokens, top_k, num_experts, in_features)
        return sorted_launches.add_many(y_NO, x_NI, a_ERI, b_ERO, routing, many)


@mix_loras.register_fake
def _(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    return x_NI.new_empty(x_NI.shape[0], b_ERO.shape[2])


@add_loras_.register_fake
def _(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> None:
    return None


@route_and_add_.register_fake
def _(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
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
    hi_EI: torch.Tensor,
    lo_EI: torch.Tensor | None,
    sums_E: torch.Tensor,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    shape = (x_NI.shape[0], top_k)
    weights_NK, expert_ids_NK = x_NI.new_empty(shape, dtype=torch.float32), x_NI.new_empty(shape, dtype=torch.int64)
    return x_NI.new_empty(x_NI.shape[0], weight_OI.shape[0]), weights_NK, expert_ids_NK


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """As the dense backend's: plain products, which every compiler can trace. Memory: a few times N * E * R."""
    x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK = ctx.saved_tensors
    num_experts, rank, _ = a_ERI.shape
    a_SI, b_SO = a_ERI.reshape(num_experts * rank, -1), b_ERO.reshape(num_experts * rank, -1)
    weights_NE = weights_NK.new_zeros(x_NI.shape[0], num_experts).scatter_add(1, expert_ids_NK, weights_NK)
    weights_NE1 = weights_NE.to(x_NI.dtype).unsqueeze(2)
    h_NER = (x_NI @ a_SI.T).view(-1, num_experts, rank)
    back_NER = (gradient_NO @ b_SO.T).view(-1, num_experts, rank)
    weighted_NS = (back_NER * weights_NE1).flatten(1)
    wants_x, wants_a, wants_b, wants_w, _ = ctx.needs_input_grad
    slopes_NE = (h_NER.float() * back_NER.float()).sum(2) if wants_w else None
    return (
        weighted_NS @ a_SI if wants_x else None,
        (weighted_NS.T @ x_NI).view_as(a_ERI) if wants_a else None,
        ((h_NER * weights_NE1).flatten(1).T @ gradient_NO).view_as(b_ERO) if wants_b else None,
        None if slopes_NE is None else slopes_NE.gather(1, expert_ids_NK).to(weights_NK.dtype),
        None,
    )


mix_loras.register_autograd(_backward, setup_context=_keep)
