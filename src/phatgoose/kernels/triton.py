"""Registered operators: Triton kernels on CUDA, the PyTorch backends elsewhere.

`mix_loras` and `add_loras_` (here) mix; `route_and_add_` and `routed_linear`
(`routing_operators.py`) route too, and so do those for layers of one x
(`shared_operators.py`). They have fake implementations, wait for nothing on the
host and allocate by shapes alone, so they go through
torch.compile(fullgraph=True) and CUDA graphs. A trailing underscore: adds into
its first argument. What runs where is in `dispatch.py`.

Only `mix_loras` has a gradient; the others are for inference (see
`phatgoose.kernels.add_loras`).

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, S = E * R.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from phatgoose.kernels import routing_operators as routing_operators  # registers its own
from phatgoose.kernels import shared_operators as shared_operators
from phatgoose.kernels.dispatch import mix_on_cuda, mix_with_torch

_ON_CUDA: dict[str, Callable[..., Any]] = {
    "route_and_add_": routing_operators.route_and_add_on_cuda,
    "routed_linear": routing_operators.routed_linear_on_cuda,
    "route_and_add_shared_": shared_operators.route_and_add_shared_on_cuda,
    "routed_linears": shared_operators.routed_linears_on_cuda,
}


def call(name: str, x_NI: torch.Tensor, *arguments: Any) -> Any:
    """Call one of the operators that route; nothing may want a gradient.

    On CUDA, unless somebody traces, this calls what the operator would call: PyTorch's dispatcher takes about as long
    for an operator that is written in Python as the host takes for all of its launches.

    Args:
        name: of the operator.
        x_NI: the activations.
        arguments: all that the operator takes, x_NI too.
    """
    if x_NI.is_cuda and type(x_NI) is torch.Tensor and not torch.compiler.is_compiling():
        with torch.no_grad():
            return _ON_CUDA[name](*arguments)
    return getattr(torch.ops.phatgoose, name)(*arguments)


@torch.library.custom_op("phatgoose::mix_loras", mutates_args=())
def mix_loras(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    return mix_with_torch(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK).clone()


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
    y_NO += mix_with_torch(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)


@mix_loras.register_kernel("cuda")
def _(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    y_NO = x_NI.new_zeros(x_NI.shape[0], b_ERO.shape[2])
    mix_on_cuda(y_NO, x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
    return y_NO


add_loras_.register_kernel("cuda")(mix_on_cuda)


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
