"""Compile every Triton launch of real layers for a Hopper GPU, without one: registers, spills, shared memory.

    python benchmarks/compile_kernels.py

The launchers run on fake CUDA tensors; what they would launch is compiled for
sm_90 by the ptxas that comes with Triton, and read back with its cuobjdump.
A stack is what spilled out of registers, except a few bytes of an array.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Iterator
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

from phatgoose.kernels import launches, settings, sorted_launches

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
            {(names.index(name),): [["tt.divisibility", 16]] for name in self._attributes()},
        )
        return triton.compile(source, target=TARGET, options=self.options)

    def _signature(self) -> dict[str, str]:
        return {p.name: "constexpr" if p.is_constexpr else _type(self.arguments[p.name]) for p in self.kernel.params}

    def _attributes(self) -> dict[str, int]:
        """Arguments that are multiples of 16; torch aligns all tensors."""
        return {
            p.name: 16
            for p in self.kernel.params
            if p.name not in self.constants
            and (
                isinstance(self.arguments[p.name], torch.Tensor)
                or (_specialised(p) and type(self.arguments[p.name]) is int and self.arguments[p.name] % 16 == 0)
            )
        }


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
    rank: int = 16,
    top_k: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    pdl: bool = False,
) -> list[Launch]:
    """What one routed layer launches."""
    with FakeTensorMode(), recorded() as found:
        new = {"device": "cuda", "dtype": dtype}
        x, y = torch.empty(tokens, inputs, **new), torch.empty(tokens, outputs, **new)
        a, b = torch.empty(experts, rank, inputs, **new), torch.empty(experts, rank, outputs, **new)
        hi = torch.empty(experts, inputs, **new)
        lo = None if dtype == torch.float32 else torch.empty_like(hi)
        sums = torch.empty(experts, device="cuda")
        bias = torch.empty(1, experts, device="cuda")
        question = launches.Question(hi, lo, sums, bias, top_k, 1e-5, 1.0)
        if settings.takes_few(tokens, top_k):
            few = dataclasses.replace(settings.few(tokens, experts, inputs), pdl=pdl)
            launches.add_few(y, x, a, b, question, few)
        else:
            many = dataclasses.replace(settings.many(tokens, top_k, experts, inputs), pdl=pdl)
            sorted_launches.add_many(y, x, a, b, question, many)
    return found


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
