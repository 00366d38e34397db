"""One routed layer on a GPU beside the base layer and one static LoRA, all as CUDA-graph replays.

    python benchmarks/routed_layer.py --out benchmarks/rows/routed_layer.csv
    python benchmarks/routed_layer.py --sweep        # block sizes, splits and warps
    python benchmarks/routed_layer.py --profile      # each kernel by itself; --out: another file's rows
    python benchmarks/routed_layer.py --device cpu   # a rehearsal at tiny size, in Triton's interpreter

bf16, rank 16, top-2. "one LoRA" is three plain products and an add. Every method runs over several layers with
their own weights, together larger than the L2 cache, in one graph. Before anything is timed, each routed method is
compared with fp64. Columns: microseconds (median), ratio to "one LoRA", error of y in units of bf16's eps, and the
share of tokens whose experts differ from fp64's. Rows of one device and shape replace those of an earlier run.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

if "cpu" in sys.argv:  # before triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from layers import (
    EPS,
    RULE,
    TOP_K,
    Layer,
    Result,
    Routed,
    Wrong,
    base,
    check,
    chosen_settings,
    layers_of,
    with_kernels,
)
from measuring import device_name, replace_rows
from replays import microseconds
from sweep import sweep
from torch.nn import functional as F

from phatgoose.kernels import KernelOptions, Routing, mix_loras
from phatgoose.kernels.cuda import few, many, settings

# a run replaces the rows of the shapes that it measures
KEYS = ("device", "inputs", "outputs", "experts", "tokens")
SHAPES = ["4096x4096", "2048x2048", "2048x5120", "4096x14336"]


def one_lora(layer: Layer) -> torch.Tensor:
    return F.linear(layer.x_NI, layer.w_OI) + F.linear(layer.x_NI, layer.a_ERI[0]) @ layer.b_ERO[0]


def beside(layer: Layer, chosen: settings.Few) -> Result:
    """Ours for few tokens, the base layer at the same time as routing and A."""
    (y_NO,), routing = few.linears(layer.x_NI, [(layer.w_OI, None)], [layer.kernel_layer], RULE, chosen)
    return y_NO, routing.layer(0)


def before(layer: Layer, chosen: settings.Many) -> Result:
    """Ours for many tokens, the base layer last."""
    (y_NO,), routing = many.linears(layer.x_NI, [layer.w_OI], [layer.kernel_layer], RULE, chosen)
    return y_NO, routing.layer(0)


def with_torch(layer: Layer, backend: str) -> Result:
    """Ours, with a PyTorch backend and the router's own code."""
    scores_NE = F.layer_norm(layer.x_NI.float(), layer.x_NI.shape[1:], eps=EPS) @ layer.prototypes_EI.T
    top_NK, ids_NK = scores_NE.topk(TOP_K)
    routing = Routing(top_NK.softmax(1), ids_NK)
    update_NO = mix_loras(layer.x_NI, layer.a_ERI, layer.b_ERO, routing, backend=backend)  # type: ignore[arg-type]
    return base(layer) + update_NO, routing


def routed_methods(tokens: int, experts: int, inputs: int, device: str, torch_backends: bool) -> dict[str, Routed]:
    """Every way of ours that is measured at a shape."""
    methods: dict[str, Routed] = {}
    for is_few in (True, False):
        if is_few and tokens > 256:
            continue
        name, plain = "few" if is_few else "many", chosen_settings(tokens, experts, inputs, is_few=is_few)
        for pdl in (False, True) if device == "cuda" else (False,):
            chosen = dataclasses.replace(plain, pdl=pdl)
            methods[f"triton, {name}{', pdl' if pdl else ''}"] = partial(with_kernels, chosen=chosen)
            if is_few and device == "cuda":
                methods[f"triton, few, beside the base{', pdl' if pdl else ''}"] = partial(beside, chosen=chosen)  # type: ignore[arg-type]
    methods["triton, many, before the base"] = partial(before, chosen=settings.many(tokens, TOP_K, experts, inputs))
    if torch_backends:
        backends = ["grouped"] + ["gather"] * (tokens <= 64) + ["dense"] * (experts <= 64)
        methods |= {f"torch, {backend}": partial(with_torch, backend=backend) for backend in backends}
    return methods


def measure(args: argparse.Namespace) -> None:
    """All shapes; prints what it finds, and writes each when it is finished."""
    device = "cpu" if args.device == "cpu" else "cuda"
    begin = time.perf_counter()
    for shape, experts, tokens in ((s, e, t) for s in args.shapes for e in args.experts for t in args.tokens):
        inputs, outputs = map(int, shape.split("x"))
        layers = layers_of(tokens, experts, inputs, outputs, device)
        methods = routed_methods(tokens, experts, inputs, device, args.torch_backends)
        checked: dict[str, tuple[float, float]] = {}
        for name in list(methods):
            try:
                checked[name] = check(layers[0], methods[name])
            except (Wrong, RuntimeError) as error:
                print(f"WRONG {shape} N {experts} T {tokens} {name}: {str(error)[:300]}", flush=True)
                del methods[name]  # a wrong result has no time
        calls: Mapping[str, Sequence[Callable[[], object]]] = {
            name: [partial(method, layer) for layer in layers]
            for name, method in {"base": base, "one LoRA": one_lora, **methods}.items()
        }
        times = microseconds(calls, args.rounds, device)
        rows = []
        for name, found in times.items():
            units, flips = checked.get(name, (float("nan"), float("nan")))
            rows.append(
                {
                    "device": device_name(device), "torch": torch.__version__, "inputs": inputs, "outputs": outputs,
                    "experts": experts, "tokens": tokens, "method": name, "microseconds": f"{found:.2f}",
                    "ratio_to_one_lora": f"{found / times['one LoRA']:.3f}", "error_eps": f"{units:.2f}",
                    "flips": f"{flips:.5f}",
                }
            )  # fmt: skip
        print(
            f"[{time.perf_counter() - begin:5.0f} s] {shape} N {experts} T {tokens}: "
            + "  ".join(f"{name} {found:.1f} ({found / times['one LoRA']:.2f})" for name, found in times.items()),
            flush=True,
        )
        if args.out:
            replace_rows(args.out, rows, *KEYS)
        del layers, calls
        if time.perf_counter() - begin > args.seconds:
            print("out of time; the rest is left out", flush=True)
            break


def profile(args: argparse.Namespace) -> None:
    """Print and write the device time of each kernel of one layer, in microseconds."""
    for shape, experts, tokens in ((s, e, t) for s in args.shapes for e in args.experts for t in args.tokens):
        inputs, outputs = map(int, shape.split("x"))
        layers = layers_of(tokens, experts, inputs, outputs, "cuda")
        # without overlap: a kernel that waits for the one in front would count its wait
        chosen = chosen_settings(tokens, experts, inputs, is_few=not KernelOptions().sorts(tokens, TOP_K))
        chosen = dataclasses.replace(chosen, pdl=False)
        rows: list[dict[str, object]] = []
        methods: dict[str, Callable[[Layer], object]] = {
            "one LoRA": one_lora,
            "triton": partial(with_kernels, chosen=chosen),
        }
        for name, method in methods.items():
            for layer in layers:
                method(layer)
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as found:
                for layer in layers * 5:
                    method(layer)
                torch.cuda.synchronize()
            times = {e.key[:60]: e.self_device_time_total / (5 * len(layers)) for e in found.key_averages()}
            sizes = {"inputs": inputs, "outputs": outputs, "experts": experts, "tokens": tokens, "method": name}
            rows += [
                {"device": device_name("cuda"), "torch": torch.__version__, **sizes, "kernel": kernel,
                 "microseconds": f"{time:.2f}"}
                for kernel, time in times.items() if time > 0
            ]  # fmt: skip
            print(
                f"{shape} N {experts} T {tokens} {name}: {sum(times.values()):.1f} = "
                + " + ".join(f"{time:.1f} {kernel}" for kernel, time in times.items() if time > 0),
                flush=True,
            )
        if args.out:
            replace_rows(args.out, rows, *KEYS)
        del layers


def compile_first(args: argparse.Namespace) -> None:
    """Compile with all cores what `measure` will launch."""
    from compile_kernels import compile_layers

    begin = time.perf_counter()
    layers = []
    for shape, experts, tokens in ((s, e, t) for s in args.shapes for e in args.experts for t in args.tokens):
        inputs, outputs = map(int, shape.split("x"))
        sizes = {"tokens": tokens, "experts": experts, "inputs": inputs, "outputs": outputs, "bias": False}
        for is_few in (True, False) if tokens <= 256 else (False,):
            chosen = chosen_settings(tokens, experts, inputs, is_few=is_few)
            layers += [{**sizes, "chosen": chosen, "pdl": pdl} for pdl in (False, True)]
        layers.append({**sizes, "chosen": chosen, "after": True})
    number = compile_layers(layers)
    print(f"[{time.perf_counter() - begin:5.0f} s] {number} kernels compiled", flush=True)


def main() -> None:
    """Measure and write rows, or sweep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", help="INPUTSxOUTPUTS")
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=120, help="begin no shape after this")
    parser.add_argument("--torch-backends", action="store_true", help="measure those too")
    parser.add_argument("--sweep", action="store_true", help="settings, one field after the other")
    parser.add_argument("--profile", action="store_true", help="time of each kernel instead")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    tiny = args.device == "cpu"
    args.shapes = args.shapes or (["64x96"] if tiny else SHAPES)
    args.experts = args.experts or ([9] if tiny else [166, 36, 1000])
    args.tokens = args.tokens or ([1, 17] if tiny else [1, 32, 4096])
    if args.sweep:
        sweep(args)
        return
    if not tiny:
        compile_first(args)
    if args.profile:
        profile(args)
        return
    measure(args)


if __name__ == "__main__":
    main()
