"""What runs on a GPU: the one place that checks operands, and decides between few tokens and many.

Few tokens (at most 128 (token, expert) pairs: 64 tokens with top-2), layers of one x in the same three launches:

    main stream    scores.partial_scores -> few.shrink_few (top-k, then A) -> few.expand_few (y += B h)
    second stream  base layer(s), in a CUDA graph only (overlap_base) ------^  joins before B
    Without a graph, or without overlap_base, the base layer(s) come first, on the main stream. `pdl`: each kernel
    starts before the one in front has ended.

Many tokens, all on the main stream, layers of one x in the same launches but for B:

    scores.partial_scores, or cuBLAS with many experts -> choice.choose_many (top-k) -> sort.place_pairs
      -> many.shrink_many (A) -> many.expand_many (B), one launch per layer, range of columns and k -> base layer(s)
    The base layers come last, and add themselves, if none has a bias (base_last); else they come first.

A layer 4096 -> 4096, 166 experts of rank 16, top-2, bf16; few: 1 token, many: 4,096 (docs/kernels.md):

    kernel           grid                            bytes read, or operations            bound by
    partial_scores   (N / BN, G E / BE + 1, S)       few: 2.7 MB of prototypes            few: launch, then bytes
      or cuBLAS                                      many: 11 GFLOP, x from L2            many: matrix units
    shrink_few       (N, S, G)                       0.26 MB (N K R I 2)                  launch, latency of top-k
    expand_few       (N, O / BO, G)                  0.26 MB (N K R O 2)                  launch, then bytes
    choose_many      (N,), one warp each             6 MB of partial scores               latency of top-k
    place_pairs      (E, G)                          32 KB of ids per program, from L2    latency
    shrink_many      (tiles of M, S, G)              67 MB of gathered x, 22 MB of A      bytes
    expand_many      (tiles of N, columns / BO)      67 MB: y read and written once       bytes
    base layer       cuBLAS                          few: 34 MB; many: 137 GFLOP          few: bytes; many: arithmetic

Block sizes, splits and warps come from tables in settings.py. Measure others, then write the best ones there:

    python benchmarks/routed_layer.py --sweep --shapes 4096x4096 --experts 166 --tokens 1 32 4096

Axes: G layers of one x, N tokens, E experts, K chosen experts, M = N * K pairs, I in-features, O out-features, R rank,
S splits of I, BN, BE, BO block sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch.nn import functional as F

from phatgoose.kernels import choose
from phatgoose.kernels.cuda import few, many, settings
from phatgoose.kernels.cuda.choice import empty_routing
from phatgoose.kernels.options import DEFAULT_OPTIONS, KernelOptions
from phatgoose.kernels.types import Layer, Routing, Rule

# the kernels unroll their loop over the chosen experts; more are left to PyTorch
MAX_TOP_K = 8
# layers of one x that share launches
MAX_LAYERS = 3

Base = tuple[torch.Tensor, torch.Tensor | None]


def add_loras_(
    y_NO: torch.Tensor, x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor, routing: Routing
) -> None:
    """See `phatgoose.kernels.add_loras_`."""
    top_k = routing.expert_ids_NK.shape[1]
    if top_k > MAX_TOP_K:
        y_NO += choose.mix_loras(x_NI, a_ERI, b_ERO, routing)
        return
    check_dtypes(x_NI, a_ERI, b_ERO)
    _check_rows(y_NO)
    if x_NI.shape[0] == 0:
        return
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    a_ERI, b_ERO = a_ERI.contiguous(), b_ERO.contiguous()
    routing = Routing(*(t.contiguous() for t in routing))
    with torch.cuda.device_of(x_NI):
        chosen = _settings(x_NI, len(a_ERI), 1, top_k, DEFAULT_OPTIONS)
        if isinstance(chosen, settings.Few):
            few.add_given_(y_NO, x_NI, a_ERI, b_ERO, routing, chosen)
        else:
            many.add_given_(y_NO, x_NI, a_ERI, b_ERO, routing, chosen)


def route_and_add_(
    ys: Sequence[torch.Tensor], x_NI: torch.Tensor, layers: Sequence[Layer], rule: Rule, options: KernelOptions
) -> Routing:
    """See `phatgoose.kernels.route_and_add_`."""
    if rule.top_k > MAX_TOP_K:
        return choose.route_and_add_(ys, x_NI, layers, rule)
    layers = checked(x_NI, layers, ys)
    for y_NO in ys:
        _check_rows(y_NO)
    if x_NI.shape[0] == 0:
        return empty_routing(x_NI, len(layers), rule.top_k)
    x_NI = x_NI if x_NI.stride(1) == 1 else x_NI.contiguous()
    with torch.cuda.device_of(x_NI):
        chosen = _settings(x_NI, len(layers[0].a_ERI), len(layers), rule.top_k, options)
        if isinstance(chosen, settings.Few):
            return few.add_(ys, x_NI, layers, rule, chosen)
        return many.add_(ys, x_NI, layers, rule, chosen)


def routed_linears(
    x_NI: torch.Tensor, bases: Sequence[Base], layers: Sequence[Layer], rule: Rule, options: KernelOptions
) -> tuple[list[torch.Tensor], Routing]:
    """See `phatgoose.kernels.routed_linears`."""
    if not _includes_bases(x_NI, bases, rule.top_k, options):
        ys = [F.linear(x_NI, weight_OI, bias_O) for weight_OI, bias_O in bases]
        return ys, route_and_add_(ys, x_NI, layers, rule, options)
    layers = checked(x_NI, layers, [weight_OI for weight_OI, _ in bases])
    x_NI = x_NI.contiguous()
    with torch.cuda.device_of(x_NI):
        chosen = _settings(x_NI, len(layers[0].a_ERI), len(layers), rule.top_k, options)
        if isinstance(chosen, settings.Few):
            return few.linears(x_NI, bases, layers, rule, chosen)
        return many.linears(x_NI, [weight_OI for weight_OI, _ in bases], layers, rule, chosen)


def _settings(
    x_NI: torch.Tensor, num_experts: int, layers: int, top_k: int, options: KernelOptions
) -> settings.Few | settings.Many:
    """Which kernels, and their block sizes."""
    (num_tokens, in_features), pdl = x_NI.shape, x_NI.is_cuda and _is_hopper(x_NI.device)
    if options.sorts(num_tokens, top_k):
        return settings.many(num_tokens, top_k, num_experts, in_features, layers, pdl=pdl)
    pdl = pdl and num_tokens <= options.pdl_max_tokens
    return settings.few(num_tokens, num_experts, in_features, layers, pdl=pdl)


def _includes_bases(x_NI: torch.Tensor, bases: Sequence[Base], top_k: int, options: KernelOptions) -> bool:
    """Whether the base layers are launched with the rest: few tokens beside routing and A, many after B.

    Beside only while a graph is captured: without one, decoding waits for the host, and two streams are more work.
    """
    if len(x_NI) == 0 or top_k > MAX_TOP_K:
        return False
    if options.sorts(len(x_NI), top_k):
        return options.base_last and all(bias_O is None for _, bias_O in bases)
    return options.overlap_base and x_NI.is_cuda and torch.cuda.is_current_stream_capturing()


@cache
def _is_hopper(device: torch.device) -> bool:
    """Whether kernels may start before the one in front has ended."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def checked(x_NI: torch.Tensor, layers: Sequence[Layer], outputs: Sequence[torch.Tensor]) -> Sequence[Layer]:
    """Validate what the kernels assume of layers; contiguous ones.

    Args:
        outputs: y_NO, or weight_OI, of each layer.
    """
    if len(layers) > 1:
        _check_alike(layers, outputs)
    for layer in layers:
        check_dtypes(x_NI, layer.a_ERI, layer.b_ERO)
        check_gates(x_NI, layer.gates_HPI)
    return [layer if _is_ready(layer) else _make_ready(layer) for layer in layers]


def check_dtypes(x_NI: torch.Tensor, a_ERI: torch.Tensor, b_ERO: torch.Tensor) -> None:
    """Raise TypeError if the kernels cannot read these operands."""
    if x_NI.dtype not in choose.TRITON_DTYPES or not x_NI.dtype == a_ERI.dtype == b_ERO.dtype:
        raise TypeError(
            f"x, a and b must share one of {choose.TRITON_DTYPES}, got {x_NI.dtype}, {a_ERI.dtype}, {b_ERO.dtype}"
        )


def check_gates(x_NI: torch.Tensor, gates_HPI: torch.Tensor) -> None:
    """Raise TypeError or ValueError if the kernels would misread these prototypes."""
    if gates_HPI.dtype != x_NI.dtype:
        raise TypeError(f"prototypes are in {gates_HPI.dtype}, activations in {x_NI.dtype}")
    if not gates_HPI.is_contiguous():
        raise ValueError(f"the prototypes have gaps (strides {gates_HPI.stride()})")


def _check_alike(layers: Sequence[Layer], outputs: Sequence[torch.Tensor]) -> None:
    """Raise TypeError or ValueError if these layers cannot share launches."""
    if len(layers) > MAX_LAYERS or len({output.dtype for output in outputs}) > 1:
        raise TypeError(f"up to {MAX_LAYERS} layers of one dtype, got {[output.dtype for output in outputs]}")
    shapes = [(layer.a_ERI.shape, None if layer.bias_NE is None else layer.bias_NE.shape) for layer in layers]
    if len(set(shapes)) > 1:
        raise ValueError(f"layers of one x differ: {shapes}")


def _check_rows(y_NO: torch.Tensor) -> None:
    """Raise ValueError if the rows of y are not contiguous."""
    if y_NO.stride(1) != 1:
        raise ValueError(f"the rows of y have gaps (strides {y_NO.stride()})")


def _is_ready(layer: Layer) -> bool:
    bias_NE = layer.bias_NE
    return (
        layer.a_ERI.is_contiguous()
        and layer.b_ERO.is_contiguous()
        and (bias_NE is None or (bias_NE.dtype == torch.float32 and bias_NE.is_contiguous()))
    )


def _make_ready(layer: Layer) -> Layer:
    bias_NE = layer.bias_NE
    return layer._replace(
        a_ERI=layer.a_ERI.contiguous(),
        b_ERO=layer.b_ERO.contiguous(),
        bias_NE=None if bias_NE is None else bias_NE.float().contiguous(),
    )
