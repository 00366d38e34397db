"""What the registered operators run: which device, which kernels.

On CUDA the Triton kernels; elsewhere what `phatgoose.kernels.choose` says, and so
on CUDA for more than 8 experts per token. Triton is imported when first needed.

Axes: N tokens, E experts, K chosen experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from phatgoose.kernels import TRITON_DTYPES, choose, load, runs_numba

# the kernels unroll their loop over the chosen experts
MOST_TOP_K = 8
# layers of one x that share launches
MOST_LAYERS = 3


def mix_with_torch(
    x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, w_NK: torch.Tensor, ids_NK: torch.Tensor
) -> Any:
    """See `phatgoose.kernels.mix_loras`."""
    on_cpu = x_NI.device.type == "cpu"
    shape = x_NI.shape[0], ids_NK.shape[1], a_ERI.shape[0], a_ERI.shape[1]
    backend = choose(*shape, on_cpu=on_cpu, numba=on_cpu and runs_numba(x_NI.dtype))
    return load(backend)(x_NI, a_ERI, b_ERO, w_NK, ids_NK)


def route_with_torch(
    x_NI: torch.Tensor,
    halves_HPI: torch.Tensor,
    num_experts: int,
    bias_NE: torch.Tensor | None,
    top_k: int,
    eps: float,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(weights_NK, expert_ids_NK); see `phatgoose.kernels.routing_operators.route_and_add_`."""
    prototypes_EI = halves_HPI[:, :num_experts].float().sum(dim=0)
    scores_NE = F.layer_norm(x_NI.float(), x_NI.shape[-1:], eps=eps) @ prototypes_EI.T
    if bias_NE is not None:
        scores_NE = scores_NE + bias_NE
    top_NK, expert_ids_NK = torch.topk(scores_NE, top_k, dim=-1)
    return torch.softmax(top_NK / temperature, dim=-1).nan_to_num(0.0), expert_ids_NK


def mix_on_cuda(
    y_NO: torch.Tensor,
    x_NI: torch.Tensor,
    a_ERI: torch.Tensor,
    b_ERO: torch.Tensor,
    weights_NK: torch.Tensor,
    expert_ids_NK: torch.Tensor,
) -> None:
    """y_NO += the updates, routing given."""
    if expert_ids_NK.shape[1] > MOST_TOP_K:
        y_NO += mix_with_torch(x_NI, a_ERI, b_ERO, weights_NK, expert_ids_NK)
        return
    from phatgoose.kernels.launches import Choice

    launch(y_NO, x_NI, a_ERI, b_ERO, Choice(weights_NK.contiguous(), expert_ids_NK.contiguous()))


def check(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Any) -> None:
    """What kernels would not notice."""
    if x_NI.dtype not in TRITON_DTYPES or not x_NI.dtype == a_ERI.dtype == b_ERO.dtype:
        raise TypeError(f"x, a and b must share one of {TRITON_DTYPES}, got {x_NI.dtype}, {a_ERI.dtype}, {b_ERO.dtype}")
    if hasattr(routing, "halves_HPI") and routing.halves_HPI.dtype != x_NI.dtype:
        raise TypeError(f"prototypes are in {routing.halves_HPI.dtype}, activations in {x_NI.dtype}")
    if hasattr(routing, "halves_HPI") and not routing.halves_HPI.is_contiguous():
        raise ValueError(f"the prototypes have gaps (strides {routing.halves_HPI.stride()})")


def check_shared(bases: list[torch.Tensor], downs: list[torch.Tensor], biases: list[torch.Tensor]) -> None:
    """What kernels for layers of one x would not notice; `bases` are their outputs or the base layers' weights."""
    if not 1 <= len(bases) <= MOST_LAYERS or len({base.dtype for base in bases}) > 1:
        raise TypeError(f"up to {MOST_LAYERS} layers of one dtype, got {[base.dtype for base in bases]}")
    for tensors in (downs, biases):
        if len({t.shape for t in tensors}) > 1:
            raise ValueError(f"layers of one x differ: {[tuple(t.shape) for t in tensors]}")


def check_rows(y_NO: torch.Tensor) -> None:
    """Kernels write rows without gaps."""
    if y_NO.stride(1) != 1:
        raise ValueError(f"the rows of y have gaps (strides {y_NO.stride()})")


def is_hopper(x_NI: torch.Tensor) -> bool:
    """Whether kernels may start before the one in front has ended."""
    return x_NI.is_cuda and torch.cuda.get_device_capability(x_NI.device) >= (9, 0)


def launch(y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Any) -> Any:
    """Check what kernels would not notice, then launch."""
    # triton is imported here: the operators exist without it
    from phatgoose.kernels import launches, settings, sorted_launches

    check(x_NI, a_ERI, b_ERO, routing)
    check_rows(y_NO)
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    a_ERI, b_ERO = a_ERI.contiguous(), b_ERO.contiguous()
    (num_tokens, in_features), num_experts = x_NI.shape, a_ERI.shape[0]
    asks = isinstance(routing, launches.Question)
    top_k = routing.top_k if asks else routing.weights_NK.shape[1]
    if num_tokens == 0:
        return launches.empty_choice(x_NI, 1, top_k).of_layer(0) if asks else routing
    with torch.cuda.device(x_NI.device):
        hopper = is_hopper(x_NI)
        if settings.takes_few(num_tokens, top_k):
            few = settings.few(num_tokens, num_experts, in_features, hopper=hopper)
            return launches.add_few(y_NO, x_NI, a_ERI, b_ERO, routing, few)
        many = settings.many(num_tokens, top_k, num_experts, in_features, hopper=hopper)
        return sorted_launches.add_many(y_NO, x_NI, a_ERI, b_ERO, routing, many)


def with_bases(x_NI: torch.Tensor, offsets: Sequence[torch.Tensor | None], top_k: int) -> bool:
    """Whether the base layers, with these biases, are launched with the rest, beside it or after it.

    Beside it only while a graph is captured: without one, decoding waits for the host, and two streams are more work.
    """
    from phatgoose.kernels import settings

    if len(x_NI) == 0 or top_k > MOST_TOP_K:
        return False
    if settings.takes_few(len(x_NI), top_k):
        return settings.BASE_BESIDE and torch.cuda.is_current_stream_capturing()
    return settings.BASE_AFTER and all(bias_O is None for bias_O in offsets)


def launch_with_bases(
    x_NI: torch.Tensor,
    bases: list[tuple[torch.Tensor, torch.Tensor | None]],
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    questions: list[Any],
) -> tuple[list[torch.Tensor], Any]:
    """Check what kernels would not notice, then launch layers of one x with their base layers (`with_bases`).

    Args:
        bases: weight_OI and bias_O of each.
        downs, ups, questions: see `launches.add_few_shared`.

    Returns:
        (y_NO of each, the choices with an axis G in front).
    """
    from phatgoose.kernels import launches, settings, sorted_launches

    x_NI = x_NI.contiguous()
    for a_ERI, b_ERO, question in zip(downs, ups, questions, strict=True):
        check(x_NI, a_ERI, b_ERO, question)
    num_tokens, in_features = x_NI.shape
    num_experts, top_k, layers = len(downs[0]), questions[0].top_k, len(downs)
    downs, ups = [a_ERI.contiguous() for a_ERI in downs], [b_ERO.contiguous() for b_ERO in ups]
    with torch.cuda.device(x_NI.device):
        hopper = is_hopper(x_NI)
        if settings.takes_few(num_tokens, top_k):
            few = settings.few(num_tokens, num_experts, in_features, layers, hopper=hopper)
            return launches.linears_and_add(x_NI, bases, downs, ups, questions, few)
        many = settings.many(num_tokens, top_k, num_experts, in_features, layers, hopper=hopper)
        weights = [weight_OI for weight_OI, _ in bases]
        return sorted_launches.linears_after(x_NI, weights, downs, ups, questions, many)
