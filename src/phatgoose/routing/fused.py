"""Routed layers that a model calls with one activation, one after the other: query, key and value; gate and up.

Axes: G layers, N tokens, I in-features, O out-features, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from phatgoose import kernels
from phatgoose.kernels.prototypes import join
from phatgoose.kernels.types import Routing
from phatgoose.routers.record import ScoresRecord

if TYPE_CHECKING:
    from phatgoose.routing.linear import RoutedLinear

# names that Llama's and T5's kin give to layers of one input, where they lie in one module
NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q", "k", "v"), ("wi_0", "wi_1"))
# modules whose keys and values are made of something else than their queries
CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "cross_attn")


class Held(NamedTuple):
    """What was computed for layers that are still to be called.

    Attributes:
        x: what all of them were computed for.
        version: of x, which counts writes into it; None where that is not known.
        outputs: of each layer; None once it was called.
        routing: how x was routed, with an axis G in front.
    """

    x: torch.Tensor
    version: int | None
    outputs: list[torch.Tensor | None]
    routing: Routing


class SharedInput:
    """Computes all its layers when the first of them is called, routing and updates in the launches of one.

    The others' outputs wait for their calls with the very same tensor. A layer that
    gets another one, or is called twice, is computed again. Masks and prompts may
    not change between the calls.

    Args:
        linears: two or three layers, which fit together (see `share_inputs`).
    """

    def __init__(self, linears: Sequence[RoutedLinear]) -> None:
        self.linears = tuple(linears)
        self._held: Held | None = None

    def take(self, g: int, x: torch.Tensor) -> tuple[torch.Tensor, Routing] | None:
        """(output of layer g for x of shape (..., I), routing of all); None: it must see for itself."""
        held = self._held
        if held is None or held.x is not x or held.outputs[g] is None or held.version != _version(x):
            held = self._held = self._compute(x)
        if held is None:
            return None
        y = held.outputs[g]
        held.outputs[g] = None
        if not any(output is not None for output in held.outputs):
            self._held = None
        assert y is not None
        return y, held.routing

    def forget(self) -> None:
        """Compute again whatever is still to be called."""
        self._held = None

    def _compute(self, x: torch.Tensor) -> Held | None:
        first = self.linears[0]
        x_NI = x.reshape(-1, x.shape[-1])
        if first.loops:
            return self._compute_in_loops(x, x_NI)
        plain = any(isinstance(linear.record, ScoresRecord) for linear in self.linears)
        if len(x_NI) == 0 or plain or torch.is_grad_enabled() or x_NI.dtype != first.a_ERI.dtype:
            return None
        layers = [linear.layer(len(x_NI)) for linear in self.linears]
        if all(linear.beside for linear in self.linears):
            bases = [(linear.weight, linear.bias) for linear in self.linears]
            flat, routing = kernels.routed_linears(x_NI, bases, layers, first.rule, first.options)
            outputs = [y_NO.view(*x.shape[:-1], -1) for y_NO in flat]
        else:
            outputs = [linear.base(x).contiguous() for linear in self.linears]
            flat = [y.view(-1, y.shape[-1]) for y in outputs]
            routing = kernels.route_and_add_(flat, x_NI, layers, first.rule, first.options)
        return Held(x, _version(x), outputs, routing)

    def _compute_in_loops(self, x: torch.Tensor, x_1I: torch.Tensor) -> Held | None:
        """One token alone: with more, a call costs little beside what it does."""
        plain = any(isinstance(linear.record, ScoresRecord) for linear in self.linears)
        if len(x_1I) != 1 or plain or torch.is_grad_enabled():
            return None
        outputs = [linear.base(x) for linear in self.linears]
        if not self.linears[0].takes_loops(x_1I, *outputs):
            return None
        from phatgoose.kernels import cpu

        flat = [y.view(1, -1) for y in outputs]
        layers = [linear.loops_layer(1) for linear in self.linears]
        routing = cpu.route_and_add_(flat, x_1I, layers, self.linears[0].rule)
        return Held(x, _version(x), outputs, routing)


def share_inputs(linears: Iterable[tuple[str, RoutedLinear]]) -> None:
    """Let layers of one input share launches, where their names say that they have one and they fit together.

    Args:
        linears: all of a model's, by site.
    """
    by_module: dict[str, dict[str, RoutedLinear]] = {}
    for site, linear in linears:
        module, _, name = site.rpartition(".")
        by_module.setdefault(module, {})[name] = linear
    for module, named in by_module.items():
        if module.rpartition(".")[2] in CROSS_ATTENTION:
            continue
        for names in NAMES:
            group = [named[name] for name in names if name in named]
            alike = len(group) > 1 and len({_kind(linear) for linear in group}) == 1
            if alike and (group[0].fused or group[0].loops):
                shared = SharedInput(group)
                if group[0].fused:  # for one product with the prototypes of all
                    for linear, gates_HPI in zip(group, join([linear.gates_HPI for linear in group]), strict=True):
                        linear.gates_HPI = gates_HPI
                for g, linear in enumerate(group):
                    linear.shared = (shared, g)


def _version(x: torch.Tensor) -> int | None:
    # compilers see writes for themselves; tensors made in inference mode are not counted
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _kind(linear: RoutedLinear) -> tuple[object, ...]:
    """What layers that share launches have in common."""
    weight = getattr(linear.weight, "dtype", None)
    return linear.fused, linear.loops, linear.a_ERI.shape, linear.a_ERI.dtype, weight, getattr(linear, "rule", None)
