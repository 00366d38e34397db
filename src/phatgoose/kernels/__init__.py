"""Mixing LoRA updates: one operation, several backends, one file each.

    y[n] = sum over k of weights[n, k] * B[ids[n, k]] A[ids[n, k]] x[n]

`mix_parameters` is another operation, for routers that merge A and B before they act.
`add_loras` adds the updates into a layer's output in place, for inference: the "triton"
backend does that at no cost. `routing_operators.py` has what routes too.

Axes: N tokens, K chosen experts, E experts, I in-features, O out-features,
R rank. Backends take plain tensors and know nothing of models.

The rule of "auto" (`runs_triton`, `choose`) is documented with its measurements in
docs/performance.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

import torch

from phatgoose.errors import ConfigError
from phatgoose.kernels import dense, gather, grouped, reference, vectors

Backend = Literal["auto", "reference", "vectors", "gather", "grouped", "dense", "numba", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# (x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK) -> y_NO
MixLoras: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

TORCH_BACKENDS: dict[str, MixLoras] = {
    "reference": reference.mix_loras,
    "vectors": vectors.mix_loras,
    "gather": gather.mix_loras,
    "grouped": grouped.mix_loras,
    "dense": dense.mix_loras,
}
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def mix_loras(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    backend: Backend = "auto",
) -> torch.Tensor:
    """Weighted sum of each token's chosen LoRA updates.

    Args:
        x_NI: activations, in the dtype of a_ERI.
        a_ERI: down-projections.
        b_ERO: up-projections with the scale folded in.
        weights_NK: routing weights, any float dtype.
        expert_ids_NK: int64 in [0, E).
        backend: which implementation; all give the same result up to rounding.

    Returns:
        y_NO in the dtype of x_NI.
    """
    if backend == "auto":
        # what is compiled must not read ids on the host either
        on_cpu = x_NI.device.type == "cpu" and not torch.compiler.is_compiling()
        shape = x_NI.shape[0], expert_ids_NK.shape[1], a_ERI.shape[0], a_ERI.shape[1]
        backend = choose(*shape, on_cpu=on_cpu, numba=on_cpu and runs_numba(x_NI.dtype))
    return load(backend)(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)


def add_loras(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> None:
    """y_NO += `mix_loras` by the "triton" backend, in place.

    Args:
        y_NO: what is added to; any float dtype, the numbers of a row side by side.

    Raises:
        RuntimeError: an argument wants a gradient.
    """
    _refuse_gradients(y_NO, x_NI, a_ERI, b_ERO, weights_NK)
    torch.ops.phatgoose.add_loras_(y_NO, x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)


def mix_parameters(
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> torch.Tensor:
    """Each token's update under the weighted sums of its experts' factors.

        y[n] = (sum over k of w[n, k] B[ids[n, k]]) (sum over k of w[n, k] A[ids[n, k]]) x[n]

    Arguments and result are those of `mix_loras`. Computes every expert for
    every token; extra memory is N * E * R numbers.
    """
    num_experts, rank, _ = a_ERI.shape
    h_NER = (x_NI @ a_ERI.reshape(num_experts * rank, -1).T).view(-1, num_experts, rank)
    weights_NE = weights_NK.new_zeros(x_NI.shape[0], num_experts).scatter_add(1, expert_ids_NK, weights_NK)
    weights_NE1 = weights_NE.to(h_NER.dtype).unsqueeze(2)
    h_N1R = (h_NER * weights_NE1).sum(dim=1, keepdim=True)
    return (h_N1R * weights_NE1).view(-1, num_experts * rank) @ b_ERO.reshape(num_experts * rank, -1)


def choose(num_tokens: int, top_k: int, num_experts: int, rank: int, *, on_cpu: bool, numba: bool = False) -> Backend:
    """The backend for a shape and a kind of device, unless Triton's. Depends on nothing else: equal calls, equal code.

    Args:
        numba: whether `runs_numba`.
    """
    if 2 * top_k > num_experts or num_experts * rank <= 32:
        return "dense"
    # a CPU reads factors where they lie; reading ids on the host would stall a GPU
    if on_cpu and num_tokens * top_k <= min(32, num_experts // 2) and (num_tokens == 1 or not numba):
        return "vectors"
    if numba:
        return "numba"
    if num_experts * rank <= 128:
        return "dense"
    if num_tokens * top_k <= min(16, num_experts // 8):
        return "gather"
    if num_experts * rank <= 256 and num_tokens <= 64:
        return "dense"
    return "grouped"


def load(backend: Backend) -> MixLoras:
    """A backend's function. Nothing is looked up by name, so that compilers can trace it."""
    if backend == "triton":
        # imported when first used, because it registers operators
        from phatgoose.kernels import triton

        return triton.mix_loras
    if backend == "numba":
        if not runs_numba(torch.float32):
            raise ConfigError("the backend numba needs the package of that name", fix="pip install 'phatgoose[numba]'")
        # imported when first used, because that takes a while
        from phatgoose.kernels import numba

        return numba.mix_loras
    return TORCH_BACKENDS[backend]


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers on `device` with factors in `dtype` take "triton" for "auto"."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None  # ROCm calls its devices so too
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in TRITON_DTYPES
        and find_spec("triton") is not None
    )


@cache
def runs_numba(dtype: torch.dtype) -> bool:
    """Whether layers on a CPU with factors in `dtype` may take "numba" for "auto"."""
    return dtype == torch.float32 and find_spec("numba") is not None


def _refuse_gradients(*tensors: torch.Tensor) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("adding in place has no gradient: use phatgoose.kernels.mix_loras, or torch.no_grad()")
