"""A routed layer with random weights, the kernels run on it, and the check that its result is right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch.nn import functional as F

from phatgoose import kernels
from phatgoose.kernels import Routing, Rule
from phatgoose.kernels.cuda import few, many, settings
from phatgoose.kernels.prototypes import split

RANK, TOP_K, EPS = 16, 2, 1e-5
RULE = Rule(TOP_K, EPS, 1.0)
Settings = settings.Few | settings.Many


@dataclasses.dataclass(frozen=True)
class Layer:
    """Random weights of one layer, and an input."""

    x_NI: torch.Tensor
    w_OI: torch.Tensor
    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    prototypes_EI: torch.Tensor
    kernel_layer: kernels.Layer

    @classmethod
    def random(cls, tokens: int, experts: int, inputs: int, outputs: int, device: str) -> Layer:
        """Fresh numbers; x has a mean, as activations do."""
        new = {"device": device, "dtype": torch.bfloat16}
        prototypes_EI = F.layer_norm(torch.randn(experts, inputs, device=device), (inputs,), eps=EPS) / inputs**0.5
        x_NI = torch.randn(tokens, inputs, **new) + 0.1
        w_OI = torch.randn(outputs, inputs, **new) / inputs**0.5
        a_ERI = torch.randn(experts, RANK, inputs, **new) / inputs**0.5
        b_ERO = torch.randn(experts, RANK, outputs, **new) / RANK**0.5
        kernel_layer = kernels.Layer(a_ERI, b_ERO, *split(prototypes_EI, torch.bfloat16), None)
        return cls(x_NI, w_OI, a_ERI, b_ERO, prototypes_EI, kernel_layer)


Result = tuple[torch.Tensor, Routing]
Routed = Callable[[Layer], Result]


def base(layer: Layer) -> torch.Tensor:
    return F.linear(layer.x_NI, layer.w_OI)


def with_kernels(layer: Layer, chosen: Settings, base_layer: bool = True) -> Result:
    """Ours, with the Triton kernels."""
    y_NO = base(layer) if base_layer else layer.x_NI.new_zeros(layer.x_NI.shape[0], layer.w_OI.shape[0])
    arguments = [y_NO], layer.x_NI, [layer.kernel_layer], RULE
    if isinstance(chosen, settings.Few):
        return y_NO, few.add_(*arguments, chosen).layer(0)
    return y_NO, many.add_(*arguments, chosen).layer(0)


def chosen_settings(tokens: int, experts: int, inputs: int, *, is_few: bool) -> Settings:
    return settings.few(tokens, experts, inputs) if is_few else settings.many(tokens, TOP_K, experts, inputs)


class Wrong(Exception):
    """A method's result is not the layer's."""


def exact(layer: Layer, routing: Routing) -> torch.Tensor:
    """The layer's output in fp64, with a routing that somebody chose."""
    x_NI = layer.x_NI.double()
    y_NO = x_NI @ layer.w_OI.double().T
    if len(x_NI) <= 64:
        a_NKRI, b_NKRO = (t[routing.expert_ids_NK].double() for t in (layer.a_ERI, layer.b_ERO))
        h_NKR = torch.einsum("nkri,ni->nkr", a_NKRI, x_NI) * routing.weights_NK.double().unsqueeze(2)
        return y_NO + torch.einsum("nkr,nkro->no", h_NKR, b_NKRO)
    for e in routing.expert_ids_NK.unique().tolist():
        n, k = torch.nonzero(routing.expert_ids_NK == e, as_tuple=True)
        update = (x_NI[n] @ layer.a_ERI[e].double().T) @ layer.b_ERO[e].double()
        y_NO.index_add_(0, n, update * routing.weights_NK[n, k].double().unsqueeze(1))
    return y_NO


def check(layer: Layer, method: Routed) -> tuple[float, float]:
    """Compare with fp64.

    Returns:
        Error of y, for the same routing, in bf16's eps; share of tokens that fp64 routes elsewhere.

    Raises:
        Wrong: by more than rounding explains, or not the same twice.
    """
    y_NO, routing = method(layer)
    expected_NO = exact(layer, routing)
    error = (y_NO.double() - expected_NO).norm(dim=1).max() / expected_NO.norm(dim=1).max()
    scores_NE = F.layer_norm(layer.x_NI.double(), layer.x_NI.shape[1:], eps=EPS) @ layer.prototypes_EI.double().T
    ids_NK = scores_NE.topk(TOP_K).indices
    flips = (routing.expert_ids_NK.sort(1).values != ids_NK.sort(1).values).any(1).double().mean()
    weights_error = (routing.weights_NK.double() - scores_NE.gather(1, routing.expert_ids_NK).softmax(1)).abs().max()
    again_NO, _ = method(layer)
    units = float(error) / torch.finfo(torch.bfloat16).eps
    if not units < 6 or not flips < 0.01 or not weights_error < 1e-3 or not torch.equal(y_NO, again_NO):
        raise Wrong(
            f"error {units:.2f} eps, flips {flips:.5f}, weights {weights_error:.2e}, "
            f"same bits {torch.equal(y_NO, again_NO)}"
        )
    return units, float(flips)


def layers_of(tokens: int, experts: int, inputs: int, outputs: int, device: str) -> list[Layer]:
    """As many layers as exceed the L2 cache twice; 12 at most."""
    copies = 2 if device == "cpu" else min(12, max(2, -(-(100 << 20) // (2 * inputs * outputs))))
    return [Layer.random(tokens, experts, inputs, outputs, device) for _ in range(copies)]
