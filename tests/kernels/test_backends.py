"""Every backend against one einsum in fp64: values and gradients, awkward shapes, every dtype.

Error is measured per row (the norm over the last axis) against the largest row, in units of the dtype's
eps. A row mixed up with another is off by 1 / eps such units, so the bounds below are far from vacuous.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.kernels import Shape
from helpers.models import llama
from helpers.pools import make_pool
from phatgoose import kernels
from phatgoose.errors import ConfigError
from phatgoose.kernels import BACKENDS, Routing, backend_for, choose, runs_numba
from phatgoose.routing.model import RoutedModel

IMPLEMENTED = [backend for backend in BACKENDS if backend != "auto"]
# A half-precision backend rounds h, w * h and y once each; fp32 sums carry a rounding for each of their terms.
EPS_UNITS = {torch.float32: 8.0, torch.bfloat16: 3.0, torch.float16: 3.0}


SHAPES = [
    Shape(tokens=1, top_k=1, experts=1, rank=4, inputs=5, outputs=3),
    Shape(tokens=1, top_k=2, experts=2, rank=8, inputs=16, outputs=24),
    Shape(tokens=3, top_k=2, experts=166, rank=16, inputs=13, outputs=40),
    Shape(tokens=17, top_k=3, experts=166, rank=4, inputs=12, outputs=7),
    Shape(tokens=17, top_k=33, experts=33, rank=8, inputs=9, outputs=11),  # top_k = E
    Shape(tokens=257, top_k=1, experts=2, rank=24, inputs=31, outputs=17),
    Shape(tokens=257, top_k=2, experts=33, rank=16, inputs=40, outputs=56),
]
# One expert takes all tokens, ids come in runs, one token names an expert twice: what counts is which experts are hit.
PATTERNS = ["random", "one takes all", "only the last", "twice"]
FULL = Shape(tokens=17, top_k=2, experts=33, rank=16, inputs=13, outputs=21)


def make_inputs(shape: Shape, dtype: torch.dtype, pattern: str = "random") -> tuple[list[torch.Tensor], torch.Tensor]:
    """([x_NI, a_ERI, b_ERO, weights_NK], expert_ids_NK)."""
    torch.manual_seed(sum(shape))
    x_NI = torch.randn(shape.tokens, shape.inputs).to(dtype)
    a_ERI = torch.randn(shape.experts, shape.rank, shape.inputs).to(dtype)
    b_ERO = torch.randn(shape.experts, shape.rank, shape.outputs).to(dtype)
    scores_NE = torch.randn(shape.tokens, shape.experts)
    if pattern == "one takes all":
        scores_NE[:, 0] = 9.0
    elif pattern == "only the last":
        scores_NE[:, : -shape.top_k] = -9.0
    top_NK, expert_ids_NK = scores_NE.topk(shape.top_k)
    if pattern == "twice":
        expert_ids_NK = expert_ids_NK[:, :1].expand(-1, shape.top_k).contiguous()
    return [x_NI, a_ERI, b_ERO, top_NK.softmax(1)], expert_ids_NK


def upstream(y: torch.Tensor) -> torch.Tensor:
    """A gradient for y whose numbers every dtype can hold."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(y.dtype)


def run(backend: str, inputs: list[torch.Tensor], ids_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """y and the gradients of x, a, b and weights."""
    leaves = [t.clone().requires_grad_() for t in inputs]
    y_NO = mix(leaves, ids_NK, backend)
    return y_NO.detach(), *torch.autograd.grad(y_NO, leaves, upstream(y_NO))


def mix(inputs: list[torch.Tensor], ids_NK: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    x_NI, a_ERI, b_ERO, weights_NK = inputs
    return kernels.mix_loras(x_NI, a_ERI, b_ERO, Routing(weights_NK, ids_NK), backend=backend)


def oracle(inputs: list[torch.Tensor], ids_NK: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same in fp64."""
    x, a, b, w = leaves = [t.double().requires_grad_() for t in inputs]
    y_NO = torch.einsum("nk,nkro,nkri,ni->no", w, b[ids_NK], a[ids_NK], x)
    return y_NO.detach(), *torch.autograd.grad(y_NO, leaves, upstream(y_NO))


def check(backend: str, shape: Shape, dtype: torch.dtype, pattern: str = "random") -> None:
    inputs, ids_NK = make_inputs(shape, dtype, pattern)
    results = zip("yxabw", run(backend, inputs, ids_NK), oracle(inputs, ids_NK), strict=True)
    for name, found, expected in results:
        assert found.shape == expected.shape
        assert found.dtype == (torch.float32 if name == "w" else dtype)
        error = (found.double() - expected).norm(dim=-1).max() / expected.norm(dim=-1).max()
        assert error <= EPS_UNITS[dtype] * torch.finfo(dtype).eps, name


def check_without_gradient(backend: str, shape: Shape, dtype: torch.dtype, pattern: str = "random") -> None:
    """Some backends do something else then."""
    inputs, ids_NK = make_inputs(shape, dtype, pattern)
    found, expected = mix(inputs, ids_NK, backend), oracle(inputs, ids_NK)[0]
    assert found.shape == expected.shape and found.dtype == dtype
    error = (found.double() - expected).norm(dim=-1).max() / expected.norm(dim=-1).max()
    assert error <= EPS_UNITS[dtype] * torch.finfo(dtype).eps


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", IMPLEMENTED)
def test_shapes(backend: str, shape: Shape) -> None:
    check(backend, shape, torch.float32)
    check_without_gradient(backend, shape, torch.float32)


@pytest.mark.parametrize("dtype", EPS_UNITS, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("backend", IMPLEMENTED)
def test_patterns_and_dtypes(backend: str, pattern: str, dtype: torch.dtype) -> None:
    check(backend, FULL, dtype, pattern)
    check_without_gradient(backend, FULL, dtype, pattern)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    inputs, ids_NK = make_inputs(FULL._replace(tokens=0), torch.float32)
    assert mix(inputs, ids_NK, backend).shape == (0, FULL.outputs)


@pytest.mark.parametrize("dtype", EPS_UNITS, ids=str)
@pytest.mark.parametrize("backend", IMPLEMENTED)
def test_same_bits_twice(backend: str, dtype: torch.dtype) -> None:
    inputs, ids_NK = make_inputs(SHAPES[-1], dtype)
    for once, again in zip(run(backend, inputs, ids_NK), run(backend, inputs, ids_NK), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("backend", IMPLEMENTED)
def test_padded_rank_changes_nothing(backend: str) -> None:
    (x_NI, a_ERI, b_ERO, weights_NK), ids_NK = make_inputs(FULL, torch.float32)
    wide = (torch.nn.functional.pad(t, (0, 0, 0, 8)) for t in (a_ERI, b_ERO))
    found = mix([x_NI, *wide, weights_NK], ids_NK, backend)
    torch.testing.assert_close(found, mix([x_NI, a_ERI, b_ERO, weights_NK], ids_NK, backend))


@pytest.mark.parametrize("numba", [True, False])
def test_auto_takes_every_fast_backend(numba: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `choose` picks, and that "auto" is that backend to the bit."""
    monkeypatch.setattr(choose, "runs_numba", lambda dtype: numba)
    picked = set()
    for shape in SHAPES:
        inputs, ids_NK = make_inputs(shape, torch.float32)
        backend = backend_for(shape.tokens, shape.top_k, shape.experts, shape.rank, on_cpu=True, numba=numba)
        picked.add(backend)
        assert torch.equal(mix(inputs, ids_NK), mix(inputs, ids_NK, backend))
    assert picked == {"dense", "numba"} if numba else {"vectors", "dense", "grouped"}
    assert backend_for(1, 2, 166, 16, on_cpu=True, numba=numba) == "vectors"
    assert backend_for(1, 2, 166, 16, on_cpu=False) == "gather"


def test_numba_is_not_taken_where_it_would_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs_numba(torch.float32) and not runs_numba(torch.bfloat16)
    runs_numba.cache_clear()
    monkeypatch.setattr("phatgoose.kernels.choose.find_spec", lambda name: None)
    assert not runs_numba(torch.float32)
    with pytest.raises(ConfigError, match=r"phatgoose\[numba\]"):
        mix(*make_inputs(FULL, torch.float32), "numba")
    runs_numba.cache_clear()


@pytest.mark.parametrize("backend", BACKENDS)
def test_activations_that_are_not_contiguous(backend: str, tmp_path: Path) -> None:
    model = RoutedModel.from_pool(llama(), make_pool(llama, tmp_path), backend=backend)
    for linear in model.routed_linears().values():
        x_SBI = torch.randn(5, 3, linear.base.in_features)
        x_BSI = x_SBI.transpose(0, 1)
        assert not x_BSI.is_contiguous()
        torch.testing.assert_close(linear(x_BSI), linear(x_BSI.contiguous()))
        torch.testing.assert_close(linear(x_BSI)[1, 2], linear(x_SBI[2, 1]))  # a single vector


@pytest.mark.parametrize("backend", ["gather", "dense", "grouped", "auto"])
def test_no_tensor_of_tokens_times_experts_times_outputs(backend: kernels.Backend) -> None:
    """PEFT's Arrow layer makes one; see docs/performance.md (Memory) for what ours make."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    tokens, experts, rank, features, top_k = 64, 50, 8, 96, 2
    x_NI = torch.randn(tokens, features)
    a_ERI, b_ERO = torch.randn(experts, rank, features), torch.randn(experts, rank, features)
    ids_NK = torch.rand(tokens, experts).topk(top_k).indices
    with Largest() as seen:
        mix([x_NI, a_ERI, b_ERO, torch.full((tokens, top_k), 0.5)], ids_NK, backend)
    assert seen.numel > 0
    assert seen.numel <= max(tokens * top_k * rank * features, experts * rank * features)
    assert seen.numel < tokens * experts * features
