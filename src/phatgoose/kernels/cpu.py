"""Routing and mixing on a CPU, in fp32, by loops that Numba compiles (`cpu_loops.py`).

`eager.grouped` calls a matrix product for every expert, of a few rows each; with many experts the calls cost more than
the arithmetic. Here all of them are one loop, and the choice of experts and the sum with the base layer's output need
no tensors in between. `mix_loras` leaves other dtypes, and whatever autograd records, to `grouped`.

The interpreter's lock is held, so no two loops run at once: one of Numba's thread pools forbids that.

Axes: G layers of one x, N tokens, E experts, P experts padded, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import get_ident
from typing import NamedTuple

import numba
import torch
from numba import config

from phatgoose.kernels import cpu_loops, eager
from phatgoose.kernels.cpu_loops import Array
from phatgoose.kernels.types import Layer, Routing, Rule

# columns of y that a thread should have for itself; where there are fewer, threads take tokens, and each reads all of B
_LEAST_COLUMNS = 512


class LayerArrays(NamedTuple):
    """A `Layer` as the loops read it: views of tensors in fp32 on the CPU; what is written there counts.

    Attributes:
        prototypes_PI: see `phatgoose.kernels.prototypes`; the rows beyond E make products of many tokens faster.
    """

    a_ERI: Array
    b_ERO: Array
    prototypes_PI: Array
    gate_sums_E: Array
    bias_NE: Array

    @classmethod
    def of(cls, layer: Layer) -> LayerArrays:
        """Views of contiguous tensors; bias_NE may not be None."""
        tensors = (layer.a_ERI, layer.b_ERO, layer.gates_HPI[0], layer.gate_sums_E, layer.bias_NE)
        return cls(*(t.detach().numpy() for t in tensors if t is not None))


def mix_loras(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing) -> torch.Tensor:
    """See `phatgoose.kernels.mix_loras`."""
    tensors = (x_NI, a_ERI, b_ERO, routing.weights_NK)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if needs_gradient or x_NI.device.type != "cpu" or x_NI.dtype != torch.float32:
        return eager.grouped(x_NI, a_ERI, b_ERO, routing)
    y_NO = x_NI.new_zeros(x_NI.shape[0], b_ERO.shape[2])
    threads = _use_threads()
    x, a, b, weights, ids = (_array(t) for t in (x_NI, a_ERI, b_ERO, routing.weights_NK.float(), routing.expert_ids_NK))
    _add(y_NO.numpy(), x, a, b, weights, ids, threads)
    return y_NO


def route_and_add_(
    ys: Sequence[torch.Tensor], x_NI: torch.Tensor, layers: Sequence[LayerArrays], rule: Rule
) -> Routing:
    """Choose experts for each token and add their updates to the outputs of some layers of one x; no gradients.

    For one token all layers are one call of the loops: that costs as much as a layer. Of equal scores the lower expert
    id wins. NaN counts as the largest.

    Args:
        ys: y_NO of each layer: the base layer's output, contiguous, fp32 on the CPU like x_NI.
        layers: one for each y, alike in all shapes but O.

    Returns:
        The routing with an axis G in front; see `phatgoose.kernels.route_and_add_`.
    """
    if x_NI.shape[0] == 1:
        return _route_and_add_one(ys, x_NI, layers, rule)
    routings = [_route_and_add_many(y_NO, x_NI, layer, rule) for y_NO, layer in zip(ys, layers, strict=True)]
    if len(routings) == 1:
        return Routing(*(t.unsqueeze(0) for t in routings[0]))
    return Routing(*(torch.stack(ts) for ts in zip(*routings, strict=True)))


def _route_and_add_one(
    ys: Sequence[torch.Tensor], x_1I: torch.Tensor, layers: Sequence[LayerArrays], rule: Rule
) -> Routing:
    """All layers in one call."""
    threads = _use_threads()
    outputs = tuple([y_1O.numpy() for y_1O in ys])
    downs, ups, prototypes, sums, biases = zip(*layers, strict=True)
    weights_GNK, ids_GNK = cpu_loops.route_and_add_one(
        outputs, _array(x_1I), downs, ups, prototypes, sums, biases, *rule, threads
    )
    return Routing(torch.from_numpy(weights_GNK), torch.from_numpy(ids_GNK))


def _route_and_add_many(y_NO: torch.Tensor, x_NI: torch.Tensor, layer: LayerArrays, rule: Rule) -> Routing:
    """One layer."""
    threads = _use_threads()
    x = _array(x_NI)
    dots_NP = x_NI @ torch.from_numpy(layer.prototypes_PI).T
    weights_NK, ids_NK = cpu_loops.choose(dots_NP.numpy(), x, layer.gate_sums_E, layer.bias_NE, *rule, threads)
    _add(y_NO.numpy(), x, layer.a_ERI, layer.b_ERO, weights_NK, ids_NK, threads)
    return Routing(torch.from_numpy(weights_NK), torch.from_numpy(ids_NK))


def _add(y_NO: Array, x_NI: Array, a_ERI: Array, b_ERO: Array, weights_NK: Array, ids_NK: Array, threads: int) -> None:
    """y_NO += the updates."""
    pairs_M, begins = cpu_loops.sorted_pairs(ids_NK, len(a_ERI))
    h_MR = cpu_loops.shrink(x_NI, a_ERI, weights_NK, pairs_M, begins)
    by_columns = min(threads, max(1, y_NO.shape[1] // _LEAST_COLUMNS))
    by_tokens = -(-threads // by_columns)
    cpu_loops.expand(h_MR, b_ERO, pairs_M, begins, y_NO, ids_NK.shape[1], by_columns, by_tokens)


def _use_threads() -> int:
    """As many as PyTorch."""
    return _set_threads(torch.get_num_threads(), get_ident())


@lru_cache(maxsize=1)
def _set_threads(number: int, caller: int) -> int:
    """Numba has a number for each thread that calls it; asking for it each time would take as long as a row of A.

    Numba changes PyTorch's number when it starts its threads, where both use one OpenMP.
    """
    threads = min(number, config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    numba.set_num_threads(threads)
    if torch.get_num_threads() != number:
        torch.set_num_threads(number)
    return threads


def _array(tensor: torch.Tensor) -> Array:
    return (tensor.detach() if tensor.requires_grad else tensor).contiguous().numpy()
