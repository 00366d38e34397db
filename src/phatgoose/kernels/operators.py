"""The four registered operators: Triton kernels on CUDA, PyTorch (`choose.py`) elsewhere.

They have fake implementations, wait for nothing on the host and allocate by shapes alone, so they go through
torch.compile(fullgraph=True) and CUDA graphs. A trailing underscore: the first argument is added to. Only `mix_loras`
has a gradient. What each computes is said once, in `phatgoose.kernels`; here lists of tensors stand for its layers
(`pack`, `unpack`), because schemas know no tuples.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank, G layers of one x, S = E * R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from phatgoose.kernels import choose
from phatgoose.kernels.options import KernelOptions
from phatgoose.kernels.types import Layer, Routing, Rule

_MIX = "Tensor x_NI, Tensor a_ERI, Tensor b_ERO, Tensor weights_NK, Tensor expert_ids_NK"
_ROUTE = (
    "Tensor[] a_ERI, Tensor[] b_ERO, Tensor[] gates_HPI, Tensor[] gate_sums_E, Tensor?[] bias_NE, "
    "SymInt top_k, float eps, float temperature, "
    "bool overlap_base, bool base_last, SymInt pdl_max_tokens, SymInt sort_above_pairs"
)


def pack(layers: Sequence[Layer], rule: Rule, options: KernelOptions) -> tuple[Any, ...]:
    """What the operators that route take behind x and the base layers."""
    switches = options.overlap_base, options.base_last, options.pdl_max_tokens, options.sort_above_pairs
    return *(list(tensors) for tensors in zip(*layers, strict=True)), *rule, *switches


def unpack(packed: Sequence[Any]) -> tuple[list[Layer], Rule, KernelOptions]:
    """The arguments of `pack`."""
    layers = [Layer(*tensors) for tensors in zip(*packed[:5], strict=True)]
    overlap_base, base_last, pdl_max_tokens, sort_above_pairs = packed[8:]
    options = KernelOptions(
        overlap_base=overlap_base,
        base_last=base_last,
        pdl_max_tokens=pdl_max_tokens,
        sort_above_pairs=sort_above_pairs,
    )
    return layers, Rule(*packed[5:8]), options


def _empty_routing(x_NI: torch.Tensor, packed: Sequence[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (len(packed[0]), x_NI.shape[0], packed[5])
    return x_NI.new_empty(shape, dtype=torch.float32), x_NI.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("phatgoose::mix_loras", mutates_args=(), schema=f"({_MIX}) -> Tensor")
def mix_loras(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    return choose.mix_loras(x_NI, a_ERI, b_ERO, Routing(*routing)).clone()


@mix_loras.register_kernel("cuda")
def _(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    # triton is imported when first needed: the operators exist without it
    from phatgoose.kernels.cuda import run

    y_NO = x_NI.new_zeros(x_NI.shape[0], b_ERO.shape[2])
    run.add_loras_(y_NO, x_NI, a_ERI, b_ERO, Routing(*routing))
    return y_NO


@mix_loras.register_fake
def _(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, *routing: torch.Tensor) -> torch.Tensor:
    return x_NI.new_empty(x_NI.shape[0], b_ERO.shape[2])


@torch.library.custom_op("phatgoose::add_loras_", mutates_args={"y_NO"}, schema=f"(Tensor(a!) y_NO, {_MIX}) -> ()")
def add_loras_(
    y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, *routing: torch.Tensor
) -> None:
    """See `phatgoose.kernels.add_loras_`."""
    y_NO += choose.mix_loras(x_NI, a_ERI, b_ERO, Routing(*routing))


@add_loras_.register_kernel("cuda")
def _(y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, *routing: torch.Tensor) -> None:
    from phatgoose.kernels.cuda import run

    run.add_loras_(y_NO, x_NI, a_ERI, b_ERO, Routing(*routing))


@add_loras_.register_fake
def _(*_: torch.Tensor) -> None:
    return None


@torch.library.custom_op(
    "phatgoose::route_and_add_",
    mutates_args={"ys"},
    schema=f"(Tensor(a!)[] ys, Tensor x_NI, {_ROUTE}) -> (Tensor weights_GNK, Tensor expert_ids_GNK)",
)
def route_and_add_(ys: list[torch.Tensor], x_NI: torch.Tensor, *packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """See `phatgoose.kernels.route_and_add_`."""
    layers, rule, _ = unpack(packed)
    weights_GNK, expert_ids_GNK = choose.route_and_add_(ys, x_NI, layers, rule)
    return weights_GNK, expert_ids_GNK


@route_and_add_.register_kernel("cuda")
def _(ys: list[torch.Tensor], x_NI: torch.Tensor, *packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from phatgoose.kernels.cuda import run

    weights_GNK, expert_ids_GNK = run.route_and_add_(ys, x_NI, *unpack(packed))
    return weights_GNK, expert_ids_GNK


@route_and_add_.register_fake
def _(ys: list[torch.Tensor], x_NI: torch.Tensor, *packed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return _empty_routing(x_NI, packed)


_Outputs = tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]


@torch.library.custom_op(
    "phatgoose::routed_linears",
    mutates_args=(),
    schema=f"(Tensor x_NI, Tensor[] weight_OI, Tensor?[] bias_O, {_ROUTE})"
    " -> (Tensor[] ys, Tensor weights_GNK, Tensor expert_ids_GNK)",
)
def routed_linears(
    x_NI: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], *packed: Any
) -> _Outputs:
    """See `phatgoose.kernels.routed_linears`."""
    layers, rule, _ = unpack(packed)
    ys = [F.linear(x_NI, weight_OI, bias_O) for weight_OI, bias_O in zip(weights, biases, strict=True)]
    return ys, *choose.route_and_add_(ys, x_NI, layers, rule)


@routed_linears.register_kernel("cuda")
def _(x_NI: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], *packed: Any) -> _Outputs:
    from phatgoose.kernels.cuda import run

    ys, routing = run.routed_linears(x_NI, list(zip(weights, biases, strict=True)), *unpack(packed))
    return ys, *routing


@routed_linears.register_fake
def _(x_NI: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], *packed: Any) -> _Outputs:
    return [x_NI.new_empty(x_NI.shape[0], len(weight_OI)) for weight_OI in weights], *_empty_routing(x_NI, packed)


def _keep(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient_NO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """Like the dense backend's: plain products, which every compiler can trace. Memory: a few times N * E * R."""
    x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK = ctx.saved_tensors
    num_experts, rank, _ = a_ERI.shape
    a_SI, b_SO = a_ERI.reshape(num_experts * rank, -1), b_ERO.reshape(num_experts * rank, -1)
    weights_NE = weights_NK.new_zeros(x_NI.shape[0], num_experts).scatter_add(1, expert_ids_NK, weights_NK)
    weights_NE1 = weights_NE.to(x_NI.dtype).unsqueeze(2)
    h_NER = (x_NI @ a_SI.T).view(-1, num_experts, rank)
    back_NER = (gradient_NO @ b_SO.T).view(-1, num_experts, rank)
    weighted_NS = (back_NER * weights_NE1).flatten(1)
    needs_x, needs_a, needs_b, needs_weights, _ = ctx.needs_input_grad
    slopes_NE = (h_NER.float() * back_NER.float()).sum(2) if needs_weights else None
    return (
        weighted_NS @ a_SI if needs_x else None,
        (weighted_NS.T @ x_NI).view_as(a_ERI) if needs_a else None,
        ((h_NER * weights_NE1).flatten(1).T @ gradient_NO).view_as(b_ERO) if needs_b else None,
        None if slopes_NE is None else slopes_NE.gather(1, expert_ids_NK).to(weights_NK.dtype),
        None,
    )


mix_loras.register_autograd(_backward, setup_context=_keep)
