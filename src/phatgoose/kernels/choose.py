"""The rule of "auto": which backend mixes, by shape and device. docs/kernels.md has its measurements.

The rule reads shapes alone, so equal calls run equal code. It never answers "triton": a layer on a GPU where
`runs_triton` is true takes that for "auto" before the rule is asked.

Axes: N tokens, K chosen experts, E experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeAlias, get_args

import torch

from phatgoose.errors import ConfigError
from phatgoose.kernels import eager, reference
from phatgoose.kernels.types import Layer, Routing, Rule

Backend = Literal["auto", "reference", "vectors", "gather", "grouped", "dense", "numba", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# (x_NI, a_ERI, b_ERO, routing) -> y_NO
MixLoras: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Routing], torch.Tensor]

_TORCH_BACKENDS: dict[str, MixLoras] = {
    "reference": reference.mix_loras,
    "vectors": eager.vectors,
    "gather": eager.gather,
    "grouped": eager.grouped,
    "dense": eager.dense,
}


def backend_for(
    num_tokens: int, top_k: int, num_experts: int, rank: int, *, on_cpu: bool, numba: bool = False
) -> Backend:
    """The backend for a shape and a kind of device; the first line that fits counts.

    Args:
        num_tokens, top_k, num_experts, rank: sizes N, K, E, R.
        on_cpu: whether ids may be read on the host: a CPU, and nothing is being compiled.
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
    """The function of a backend ("auto" and "triton" have none here).

    Raises:
        ConfigError: "numba", and there is no such package.
    """
    if backend == "numba":
        if not runs_numba(torch.float32):
            raise ConfigError("the backend numba needs the package of that name", fix="pip install 'phatgoose[numba]'")
        # imported when first used, because that takes a while
        from phatgoose.kernels import cpu

        return cpu.mix_loras
    return _TORCH_BACKENDS[backend]


def mix_loras(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """`phatgoose.kernels.mix_loras` by the backend of "auto"."""
    # compiled code must not read ids on the host either
    on_cpu = x_NI.device.type == "cpu" and not torch.compiler.is_compiling()
    shape = x_NI.shape[0], routing.expert_ids_NK.shape[1], a_ERI.shape[0], a_ERI.shape[1]
    backend = backend_for(*shape, on_cpu=on_cpu, numba=on_cpu and runs_numba(x_NI.dtype))
    return load(backend)(x_NI, a_ERI, b_ERO, routing)


def route_and_add_(ys: Sequence[torch.Tensor], x_NI: torch.Tensor, layers: Sequence[Layer], rule: Rule) -> Routing:
    """`phatgoose.kernels.route_and_add_` in PyTorch, one layer after the other."""
    routings = []
    for y_NO, layer in zip(ys, layers, strict=True):
        routing = eager.route(x_NI, layer, rule)
        y_NO += mix_loras(x_NI, layer.a_ERI, layer.b_ERO, routing)
        routings.append(routing)
    if len(routings) == 1:
        return Routing(*(t.unsqueeze(0) for t in routings[0]))
    return Routing(*(torch.stack(ts) for ts in zip(*routings, strict=True)))


def runs_triton(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers on `device` with factors in `dtype` take "triton" for "auto"."""
    return (
        device.type == "cuda"
        and torch.version.cuda is not None  # ROCm calls its devices "cuda" too
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and dtype in TRITON_DTYPES
        and find_spec("triton") is not None
    )


@cache
def runs_numba(dtype: torch.dtype) -> bool:
    """Whether layers on a CPU with factors in `dtype` may take "numba" for "auto"."""
    return dtype == torch.float32 and find_spec("numba") is not None
