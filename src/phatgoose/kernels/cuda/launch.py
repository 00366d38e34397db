"""What all Triton kernels and their launches share: the arguments of up to three layers, PDL, products.

Host and device side by side: `three` packs what `of_layer` picks from, `launch_options` asks for what `follow` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from phatgoose.kernels.types import Layer

T = TypeVar("T")


def three(arguments: Sequence[T]) -> tuple[T, T, T]:
    """The arguments of one to three layers, as kernels take them."""
    return arguments[0], arguments[min(1, len(arguments) - 1)], arguments[-1]


@triton.jit
def of_layer(g, first, second, third, LAYERS: tl.constexpr):
    """The argument of layer g, of up to three."""
    if LAYERS > 1:
        first = tl.where(g == 1, second, first)
    if LAYERS > 2:
        first = tl.where(g == 2, third, first)
    return first


def launch_options(pdl: bool, warps: int, stages: int | None = None) -> Mapping[str, Any]:
    """Options of a launch, and the kernel's own PDL, which must agree with the launch's."""
    options: dict[str, Any] = {"PDL": pdl, "num_warps": warps}
    if pdl:
        options["launch_pdl"] = True
    if stages is not None:
        options["num_stages"] = stages
    return options


@triton.jit
def follow(PDL: tl.constexpr):
    """Start before the kernel in front has ended, wait for its results, let the next one start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def product(a, b, acc, UPCAST: tl.constexpr):
    """acc + a @ b. UPCAST: in fp32, because Triton's interpreter would multiply the bits of bf16 numbers."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def sums_and_biases(layers: Sequence[Layer]) -> tuple[Any, ...]:
    """gate_sums_E, then bias_NE, of three layers; without biases the sums again, which are not read there."""
    sums = [layer.gate_sums_E for layer in layers]
    biases = [layer.gate_sums_E if layer.bias_NE is None else layer.bias_NE for layer in layers]
    return *three(sums), *three(biases)


def bias_stride(layer: Layer) -> int:
    """Elements from one token's bias to the next's; 0 if all tokens have the same."""
    if layer.bias_NE is None or layer.bias_NE.shape[0] == 1:
        return 0
    return layer.bias_NE.stride(0)


def steps_of(in_features: int, block_i: int, splits: int) -> int:
    """Blocks of I in a split."""
    blocks = -(-in_features // block_i)
    return -(-blocks // splits)
