"""The kernels: routing tokens among experts, and mixing the experts' updates into a layer's output.

    y[n] = sum over k of weights[n, k] * B[ids[n, k]] A[ids[n, k]] x[n]

What runs for one token, and where top-k is chosen:

    on a GPU        routed_linears or route_and_add_ -> cuda/run.py -> cuda/few.py
                      partial_scores    scores of all experts                            cuda/scores.py
                      shrink_few        top-k (`choose`, cuda/choice.py), then A x       cuda/few.py
                      expand_few        y += B h                                         cuda/few.py
                    from 65 tokens on (top-2) pairs are sorted by expert: cuda/sort.py, cuda/many.py
    on a CPU        with Numba, fp32: cpu.route_and_add_, one compiled call
                      route_and_add_one scores, top-k (`_choose_one`), A x and y += B h  cpu_loops.py
    elsewhere       the router's torch.topk (`Router.choose`, routers/base.py), then mix_loras by the
                    backend that `backend_for` (choose.py) names                         eager.py

Everything here takes plain tensors and knows nothing of models. `Layer`, `Rule` and `Routing` (types.py) are the
arguments, `KernelOptions` (options.py) the switches.

Axes: N tokens, K chosen experts, E experts, I in-features, O out-features, R rank, G layers of one x.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from phatgoose.kernels import choose, operators
from phatgoose.kernels.choose import BACKENDS, Backend, backend_for, runs_numba, runs_triton
from phatgoose.kernels.options import DEFAULT_OPTIONS, KernelOptions
from phatgoose.kernels.types import Layer, Routing, Rule

__all__ = [
    "BACKENDS",
    "DEFAULT_OPTIONS",
    "Backend",
    "KernelOptions",
    "Layer",
    "Routing",
    "Rule",
    "add_loras_",
    "backend_for",
    "mix_loras",
    "route_and_add_",
    "routed_linears",
    "runs_numba",
    "runs_triton",
]


def mix_loras(
    x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing, *, backend: Backend = "auto"
) -> torch.Tensor:
    """Weighted sum of each token's chosen LoRA updates. Differentiable, but for the ids.

    Args:
        x_NI: activations, in the dtype of a_ERI.
        a_ERI: down-projections.
        b_ERO: up-projections with the scale folded in.
        routing: weights in any float dtype, expert ids (int64) in [0, E).
        backend: the implementation; all give the same result up to rounding.

    Returns:
        y_NO in the dtype of x_NI.

    Raises:
        ConfigError: backend "numba" without that package.
    """
    if backend == "triton":
        return operators.mix_loras(x_NI, a_ERI, b_ERO, *routing)
    if backend == "auto":
        return choose.mix_loras(x_NI, a_ERI, b_ERO, routing)
    return choose.load(backend)(x_NI, a_ERI, b_ERO, routing)


def add_loras_(
    y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing
) -> None:
    """y_NO += `mix_loras`, in place, by the "triton" backend; for inference.

    Args:
        y_NO: what is added to; any float dtype, each row contiguous.
        x_NI, a_ERI, b_ERO, routing: see `mix_loras`.

    Raises:
        RuntimeError: autograd would have to record it.
    """
    tensors = (y_NO, x_NI, a_ERI, b_ERO, routing.weights_NK)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("adding in place has no gradient: use phatgoose.kernels.mix_loras, or torch.no_grad()")
    torch.ops.phatgoose.add_loras_(y_NO, x_NI, a_ERI, b_ERO, *routing)


def route_and_add_(
    ys: Sequence[torch.Tensor],
    x_NI: torch.Tensor,
    layers: Sequence[Layer],
    rule: Rule,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> Routing:
    """Choose experts for each token and add their updates to the outputs of one to three layers of one x.

    The scores are prototypes times standardised activations plus bias; the weights a softmax over the best `top_k`
    (PHATGOOSE, section 3.2). On CUDA the lower expert id of equal scores wins; torch.topk, used elsewhere, promises
    no order. For inference: no argument may need a gradient.

    Args:
        ys: y_NO of each layer: the base layer's output, any float dtype (the same for all), each row contiguous.
        x_NI: activations, in the dtype of a_ERI.
        layers: one for each y; alike in all shapes but O.
        rule: how scores become a routing, for all of them.
        options: see `KernelOptions`.

    Returns:
        The routing with an axis G in front.

    Raises:
        TypeError, ValueError: dtypes, shapes or strides that the kernels cannot read (CUDA).
    """
    if _skips_dispatcher(x_NI):
        from phatgoose.kernels.cuda import run

        with torch.no_grad():
            return run.route_and_add_(ys, x_NI, layers, rule, options)
    packed = operators.pack(layers, rule, options)
    return Routing(*torch.ops.phatgoose.route_and_add_(list(ys), x_NI, *packed))


def routed_linears(
    x_NI: torch.Tensor,
    bases: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    layers: Sequence[Layer],
    rule: Rule,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> tuple[list[torch.Tensor], Routing]:
    """One to three linear layers of one x, and `route_and_add_`; in CUDA graphs and for few tokens at the same time.

    Args:
        x_NI, layers, rule, options: see `route_and_add_`.
        bases: weight_OI and bias_O (or None) of each base layer, all of one dtype.

    Returns:
        y_NO of each layer, and the routing with an axis G in front.
    """
    if _skips_dispatcher(x_NI):
        from phatgoose.kernels.cuda import run

        with torch.no_grad():
            return run.routed_linears(x_NI, bases, layers, rule, options)
    weights, biases = [weight_OI for weight_OI, _ in bases], [bias_O for _, bias_O in bases]
    packed = operators.pack(layers, rule, options)
    ys, weights_GNK, expert_ids_GNK = torch.ops.phatgoose.routed_linears(x_NI, weights, biases, *packed)
    return ys, Routing(weights_GNK, expert_ids_GNK)


def _skips_dispatcher(x_NI: torch.Tensor) -> bool:
    """Whether to call what the operator would call, on CUDA, unless somebody traces.

    PyTorch's dispatcher takes about as long for an operator that is written in Python as the host takes for all of its
    launches.
    """
    return x_NI.is_cuda and type(x_NI) is torch.Tensor and not torch.compiler.is_compiling()
