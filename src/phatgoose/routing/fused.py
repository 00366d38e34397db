"""Layers that kernels compute together: one alone, or those that a model calls with one activation.

Query, key and value share their input, and so do gate and up. A lone layer is a group of one.

Axes: G layers of one x, N tokens, I in-features, O out-features, E experts, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from phatgoose import kernels
from phatgoose.kernels import Routing, Rule
from phatgoose.kernels.prototypes import join
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routers.record import ScoresRecord
from phatgoose.routing.state import CallState

if TYPE_CHECKING:
    from phatgoose.routing.linear import RoutedLinear

# names that Llama's and T5's kin give to layers of one input, where they lie in one module
NAMES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("q", "k", "v"), ("wi_0", "wi_1"))
# modules that make queries of the decoder's states, but keys and values of the encoder's
CROSS_ATTENTION = ("EncDecAttention", "encoder_attn", "cross_attn")


class Held(NamedTuple):
    """What was computed for layers that are still to be called.

    Attributes:
        x: the input that all of them were computed for.
        version: counts writes into x; None where that is not known.
        call: the call that asked; its masks and prompts counted.
        outputs: by layer; None once it was called.
        routing: weights and expert ids with an axis G in front.
    """

    x: torch.Tensor
    version: int | None
    call: CallState
    outputs: list[torch.Tensor | None]
    routing: Routing


class FusedGroup:
    """Computes all its layers when the first of them is called: routing and updates in the launches of one.

    The others' outputs wait for their calls with the very same tensor. A layer that
    gets another one, or is called twice, is computed again.

    Args:
        linears: one to three layers that fit together (see `group_layers`).
    """

    def __init__(self, linears: Sequence[RoutedLinear]) -> None:
        self.linears = tuple(linears)
        first = self.linears[0]
        assert isinstance(first.router, Phatgoose)
        self.rule = Rule(first.router.top_k, first.router.eps, first.router.temperature)
        self.options = first.options
        self.by_operator = first.backend == "triton"
        # Then the operator computes the base layers too: their weights are used, hooks on them are not called.
        self.owns_bases = (
            self.by_operator
            and (self.options.overlap_base or self.options.base_last)
            and all(type(linear.base) is nn.Linear and "forward" not in vars(linear.base) for linear in self.linears)
        )
        self._loops: list[Any] | None = None
        self._held: Held | None = None
        for index, linear in enumerate(self.linears):
            linear.group, linear.index = self, index

    def take(self, index: int, x: torch.Tensor, call: CallState) -> torch.Tensor | None:
        """The output of one layer, (..., O); None if the layer must use its formula. Reports to the call's record.

        Args:
            index: the layer's place in the group.
            x: activations of shape (..., I).
            call: the call that asks; its masks, prompts and record count.
        """
        held = self._held
        fresh = held is not None and held.x is x and held.call is call and held.version == _version(x)
        if held is None or not fresh or held.outputs[index] is None:
            held = self._compute(x, call)
            if held is None:
                self._held = None
                return None
        y = held.outputs[index]
        assert y is not None
        held.outputs[index] = None
        self._held = held if any(output is not None for output in held.outputs) else None
        record = call.record(self.linears[index].site)
        if record is not None:
            assert not isinstance(record, ScoresRecord)
            record.append(held.routing.layer(index), x.shape[:-1])
        return y

    def forget(self) -> None:
        """Compute again whatever is still to be called: a tensor has changed."""
        self._held = self._loops = None

    def _compute(self, x: torch.Tensor, call: CallState) -> Held | None:
        """All layers for one input; None where kernels cannot, or would be slower."""
        x_NI = x.reshape(-1, x.shape[-1])
        if any(isinstance(call.record(linear.site), ScoresRecord) for linear in self.linears):
            return None
        if x_NI.dtype != self.linears[0].a_ERI.dtype or self._wants_gradients(x):
            return None
        found = self._by_operator(x, x_NI, call) if self.by_operator else self._in_loops(x, x_NI, call)
        return None if found is None else Held(x, _version(x), call, *found)

    def _by_operator(self, x: torch.Tensor, x_NI: torch.Tensor, call: CallState) -> tuple[list[Any], Routing]:
        """The registered operators: Triton kernels on CUDA."""
        layers = [linear.layer(linear.added_scores(call, len(x_NI))) for linear in self.linears]
        if self.owns_bases:
            bases = [(linear.weight, linear.bias) for linear in self.linears]
            flat, routing = kernels.routed_linears(x_NI, bases, layers, self.rule, self.options)
            return [y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in flat], routing
        outputs = [linear.base(x).contiguous() for linear in self.linears]
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        return outputs, kernels.route_and_add_(flat, x_NI, layers, self.rule, self.options)

    def _in_loops(self, x: torch.Tensor, x_NI: torch.Tensor, call: CallState) -> tuple[list[Any], Routing] | None:
        """Numba's loops, for an fp32 CPU and shapes at which they are the fastest."""
        if not (x_NI.is_cpu and self._loops_are_fast(len(x_NI))) or torch.compiler.is_compiling():
            return None
        from phatgoose.kernels import cpu

        outputs = [linear.base(x).contiguous() for linear in self.linears]
        if any(y.dtype != torch.float32 for y in outputs):
            return None
        flat = [y.view(-1, y.shape[-1]) for y in outputs]
        return outputs, cpu.route_and_add_(flat, x_NI, self._loop_layers(call, len(x_NI)), self.rule)

    def _loops_are_fast(self, num_tokens: int) -> bool:
        num_experts, rank, _ = self.linears[0].a_ERI.shape
        # beside Numba's loops "vectors" is for one token, whose routing they do as well
        mixing = kernels.backend_for(num_tokens, self.rule.top_k, num_experts, rank, on_cpu=True, numba=True)
        return mixing in ("numba", "vectors")

    def _loop_layers(self, call: CallState, num_tokens: int) -> list[Any]:
        """What the loops read of each layer; looked up once, but for what a call adds to the scores."""
        from phatgoose.kernels import cpu

        if self._loops is None:
            self._loops = [
                cpu.LayerArrays.of(linear.layer(linear.router.absent_E.unsqueeze(0))) for linear in self.linears
            ]
        nothing_added = call.mask_1E is None and call.prompt_mask_BE is None and call.prompt_bias is None
        if nothing_added and not self.linears[0].router.reads_prompts:
            return self._loops
        return [
            layer._replace(bias_NE=linear.added_scores(call, num_tokens).detach().float().numpy())
            for layer, linear in zip(self._loops, self.linears, strict=True)
        ]

    def _wants_gradients(self, x: torch.Tensor) -> bool:
        """Whether autograd follows the input or a base layer: the operators have no gradient."""
        return torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for linear in self.linears for p in linear.base.parameters())
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which read their own tensors."""
        return {**self.__dict__, "_loops": None, "_held": None}


def group_layers(linears: Iterable[RoutedLinear]) -> None:
    """Let layers of one input share launches, where their names say that they have one and they fit together.

    Args:
        linears: all routed layers of a model.
    """
    by_module: dict[str, dict[str, RoutedLinear]] = {}
    for linear in linears:
        module, _, name = linear.site.rpartition(".")
        by_module.setdefault(module, {})[name] = linear
    for module, named in by_module.items():
        if module.rpartition(".")[2] in CROSS_ATTENTION:
            continue
        for names in NAMES:
            group = [named[name] for name in names if name in named]
            if len(group) > 1 and group[0].group is not None and len({_kind(linear) for linear in group}) == 1:
                if group[0].backend == "triton":  # for one product with the prototypes of all
                    for linear, gates_HPI in zip(group, join([linear.gates_HPI for linear in group]), strict=True):
                        linear.gates_HPI = gates_HPI
                FusedGroup(group)


def _version(x: torch.Tensor) -> int | None:
    # compilers see writes for themselves; tensors made in inference mode are not counted
    return None if torch.compiler.is_compiling() or x.is_inference() else x._version


def _kind(linear: RoutedLinear) -> tuple[object, ...]:
    """What layers that share launches have in common."""
    rule = None if linear.group is None else linear.group.rule
    weight = getattr(linear.weight, "dtype", None)
    return linear.group is None, linear.backend, linear.a_ERI.shape, linear.a_ERI.dtype, weight, rule, linear.options
