"""Compile every Triton launch of real layers for a Hopper GPU, without one: registers, spills, shared memory.

    python benchmarks/compile_kernels.py

The launchers run on fake CUDA tensors; what they would launch is compiled for
sm_90 by the ptxas that comes with Triton, and read back with its cuobjdump.
A stack is what spilled out of registers, except a few bytes of an array.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from phatgoose.kernels import KernelOptions, Layer, Rule
from phatgoose.kernels.cuda import few, many, settings
from phatgoose.kernels.prototypes import rows_for

RANK, TOP_K = 16, 2
TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with its arguments by name."""

    kernel: JITFunction
    arguments: dict[str, Any]
    options: dict[str, Any]
    grid: tuple[int, ...]

    @property
    def constants(self) -> dict[str, Any]:
        """What is compiled in: constexpr arguments, and run-time integers that are 1."""
        return {
            p.name: self.arguments[p.name]
            for p in self.kernel.params
            if p.is_constexpr
            or (_specialised(p) and type(self.arguments[p.name]) is int and self.arguments[p.name] == 1)
        }

    def variant(self) -> tuple[Any, ...]:
        """Equal for launches that run the same code."""
        return (self.kernel, *sorted(self._signature().items()), *map(str, sorted(self.constants.items())),
                *map(str, sorted(self._attributes().items())), *sorted(self.options.items()))  # fmt: skip

    def compile(self) -> Any:
        """The kernel for `TARGET`."""
        signature, constants = self._signature(), self.constants
        for name in constants:
            signature[name] = "constexpr"
        names = [p.name for p in self.kernel.params]
        source = ASTSource(
            self.kernel,
            {name: signature[name] for name in names},
            {(names.index(name),): value for name, value in constants.items()},
            {(names.index(name),): value for name, value in self._attributes().items()},
        )
        return triton.compile(source, target=TARGET, options=self.options)

    def _signature(self) -> dict[str, str]:
        return {p.name: "constexpr" if p.is_constexpr else _type(self.arguments[p.name]) for p in self.kernel.params}

    def _attributes(self) -> dict[str, list[list[Any]]]:
        """What Triton knows of arguments, written as it does itself: which are multiples of 16, as all tensors are."""
        found: dict[str, list[list[Any]]] = {}
        for p in self.kernel.params:
            value = self.arguments[p.name]
            if p.name in self.constants:
                continue
            if isinstance(value, torch.Tensor) or (_specialised(p) and type(value) is int):
                divides = isinstance(value, torch.Tensor) or value % 16 == 0
                found[p.name] = [["tt.divisibility", 16]] if divides else []
        return found


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Launches inside the block are kept in the list, not made."""
    found: list[Launch] = []

    def run(self: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **kwargs: Any) -> None:
        names = [p.name for p in self.params]
        arguments = dict(zip(names, args, strict=False)) | {k: v for k, v in kwargs.items() if k in names}
        options = {k: v for k, v in kwargs.items() if k not in names}
        found.append(Launch(self, arguments, options, tuple(grid)))

    with mock.patch.object(JITFunction, "run", run):
        yield found


def layer_launches(
    tokens: int,
    experts: int,
    inputs: int,
    outputs: int,
    *,
    pdl: bool = False,
    bias: bool = True,
    chosen: settings.Few | settings.Many | None = None,
    layers: int = 1,
    after: bool = False,
) -> list[Launch]:
    """What a routed bf16 layer launches, or several with one x: rank 16, top-2.

    Settings are the shape's own unless `chosen`. `after`: the base layer comes last (many tokens).
    """
    if chosen is None and not KernelOptions().sorts(tokens, TOP_K):
        chosen = settings.few(tokens, experts, inputs, layers)
    elif chosen is None:
        chosen = settings.many(tokens, TOP_K, experts, inputs, layers)
    chosen = dataclasses.replace(chosen, pdl=pdl or chosen.pdl)
    with FakeTensorMode(), recorded() as found:
        new: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        x_NI, y_NO = torch.empty(tokens, inputs, **new), torch.empty(tokens, outputs, **new)
        a_ERI, b_ERO = torch.empty(experts, RANK, inputs, **new), torch.empty(experts, RANK, outputs, **new)
        gates_HPI = torch.empty(2, rows_for(experts), inputs, **new)
        bias_NE = torch.empty(1, experts, device="cuda") if bias else None
        gate_sums_E = torch.empty(experts, device="cuda")
        layer, rule = Layer(a_ERI, b_ERO, gates_HPI, gate_sums_E, bias_NE), Rule(TOP_K, 1e-5, 1.0)
        if isinstance(chosen, settings.Few):
            few.add_([y_NO] * layers, x_NI, [layer] * layers, rule, chosen)
        elif after:
            weight_OI = torch.empty(outputs, inputs, **new)
            many.linears(x_NI, [weight_OI] * layers, [layer] * layers, rule, chosen)
        else:
            many.add_([y_NO] * layers, x_NI, [layer] * layers, rule, chosen)
    return found


def compile_layers(layers: Sequence[Mapping[str, Any]]) -> int:
    """Compile what these layers (arguments of `layer_launches`) launch, with all cores, into Triton's cache.

    A later launch with the same arguments finds it there.

    Returns:
        How many different kernels.
    """
    jobs: dict[Any, tuple[Mapping[str, Any], int]] = {}
    for layer in layers:
        for index, launch in enumerate(layer_launches(**layer)):
            jobs.setdefault(launch.variant(), (layer, index))
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_job, jobs.values(), chunksize=1))
    return len(jobs)


def _compile_job(job: tuple[Mapping[str, Any], int]) -> None:
    layer, index = job
    launch = layer_launches(**layer)[index]
    try:
        launch.compile()
    except Exception as error:  # whoever launches it will see it again
        print(f"{launch.kernel.__name__} {launch.constants}: {type(error).__name__} {str(error)[:200]}", flush=True)


def usage(compiled: Any) -> dict[str, int]:
    """REG, STACK, SHARED, LOCAL of a compiled kernel, as cuobjdump says; DYNAMIC shared bytes beside."""
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return found | {"DYNAMIC": compiled.metadata.shared}


def _specialised(parameter: Any) -> bool:
    return not parameter.is_constexpr and not parameter.do_not_specialize


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def main() -> None:
    """Print a line per compiled variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 32, 4096])
    parser.add_argument("--experts", type=int, nargs="+", default=[36, 166, 1000])
    parser.add_argument("--shapes", nargs="+", default=["4096x4096"], help="INPUTSxOUTPUTS")
    parser.add_argument("--pdl", action="store_true")
    args = parser.parse_args()
    seen = set()
    for shape in args.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for experts in args.experts:
            for tokens in args.tokens:
                for launch in layer_launches(tokens, experts, inputs, outputs, pdl=args.pdl):
                    if launch.variant() in seen:
                        continue
                    seen.add(launch.variant())
                    compiled = launch.compile()
                    mma = (
                        "wgmma"
                        if "wgmma" in compiled.asm["ptx"]
                        else "mma"
                        if "mma.sync" in compiled.asm["ptx"]
                        else ""
                    )
                    print(f"{shape} N {experts} T {tokens} {launch.kernel.__name__} grid {launch.grid} "
                          f"{usage(compiled)} {mma}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
