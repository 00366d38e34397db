"""One linear layer: ours beside its peers and beside one static LoRA, in one run.

    python benchmarks/peers.py --out benchmarks/rows/peers.csv
    python benchmarks/peers.py --device cpu   # a rehearsal at tiny size

Methods, all with the base layer and, where there is any, with the routing; rank 16, top-2, bf16 (on a CPU fp32):
the base layer alone; one static LoRA (three plain products and an add); PEFT's layer with one LoRA; PEFT's Arrow layer;
PEFT's X-LoRA layer for 4 and 8 experts, which is given its scalings, so without the classifier that makes them from
another forward pass of the whole model; the loop over the experts in the official code's steps; ours; and with
`--vllm FOLDER`, where a wheel of vLLM was unpacked, the layer around vLLM's kernel for LoRA experts, which is given the
choice of experts and their sorting (`vllm_layer.py`).

Mode "eager": plain calls, as people run them, the launches included. Mode "graph": replays of a CUDA graph; what waits
for the device has none. Each method goes through several layers with their own weights, together larger than the L2
cache, and rounds go through all methods. Columns: microseconds (median), ratio to one static LoRA's graph replay (on a
CPU to its plain calls), `error` of the largest token's output against fp64, and the most MiB that a call allocates.

Before anything is timed each method is compared with what it should compute, in fp64: Arrow with our router
`arrow-peft`, X-LoRA with the weighted sum of its scalings, the loop and ours with the router `phatgoose` and the
reference backend. What is wrong has no time. Activations point at two experts each, so that no choice is a near tie
which rounding could decide; every expert is as likely. Rows replace those of the same device and shape.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import peft
import torch
from measuring import device_name, peak_mib, replace_rows
from peer_layers import Layer, add, arrow, only_layer, split_loop, static_lora, with_adapters, x_lora
from replays import Call, graph, in_turn, median_seconds
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import BACKENDS, Backend, Routing, mix_loras
from phatgoose.routers.arrow import ArrowPeft
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.linear import RoutedLinear

RANK, TOP_K = 16, 2
SHAPES = ["4096x4096", "2048x2048", "2048x5120", "4096x14336"]
BASE, STATIC = "base", "one static LoRA"
X_LORA_EXPERTS = (4, 8)
# of the largest output; an error in the wrong expert, weight or scale is some tenths
TOLERANCE = {torch.bfloat16: 6 * torch.finfo(torch.bfloat16).eps, torch.float32: 1e-4}
Cell = tuple[int, int, int, int]  # in-features, out-features, experts, tokens


@dataclasses.dataclass(frozen=True)
class Site:
    """A linear layer and its experts.

    Attributes:
        base: the layer.
        stack: the experts. The largest part of an expert's update reads one direction, which is also its gate.
        router: `phatgoose`.
        scalings_NE: what X-LoRA's classifier would give, for the most tokens; a row's numbers are far apart.
    """

    base: nn.Linear
    stack: SiteStack
    router: Phatgoose
    scalings_NE: torch.Tensor

    @classmethod
    def random(cls, inputs: int, outputs: int, experts: int, most_tokens: int, draw: Draw) -> Site:
        """Fresh numbers; updates are about as large as the base layer's output."""
        directions_EI = nn.functional.normalize(draw.fp32(experts, inputs), dim=1)
        a_ERI = draw.fp32(experts, RANK, inputs) * (0.06 / inputs**0.5)
        a_ERI[:, 0] = 0.16 * directions_EI
        base = nn.Linear(inputs, outputs, bias=False, device="meta")
        base.weight = nn.Parameter((draw.fp32(outputs, inputs) / inputs**0.5).to(draw.dtype), requires_grad=False)
        stack = SiteStack(
            a_ERI=a_ERI.to(draw.dtype),
            b_ERO=draw.fp32(experts, RANK, outputs).to(draw.dtype),
            gates_EI=directions_EI,
            present_E=torch.ones(experts, dtype=torch.bool),
        )
        router = Phatgoose(stack, RouterConfig(top_k=TOP_K)).to(draw.device)
        scalings_NE = (1 + draw.uniform(most_tokens, experts).argsort(dim=1)) / 2
        return cls(base, stack, router, scalings_NE.to(draw.dtype))

    def activations(self, tokens: int, draw: Draw) -> torch.Tensor:
        """x_NI, each token near two experts' directions."""
        assert self.stack.gates_EI is not None
        first_NI, second_NI = self.stack.gates_EI[
            draw.uniform(tokens, len(self.stack.gates_EI)).topk(2).indices
        ].unbind(1)
        return (draw.fp32(tokens, self.base.in_features) + 9 * first_NI + 8 * second_NI).to(draw.dtype)


class Draw:
    """Random numbers on a device, from a generator of its own: a capture that fails may spoil the global one.

    Args:
        device: "cuda" or "cpu".
        dtype: that layers and activations get.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self._generator = torch.Generator(device).manual_seed(0)

    def fp32(self, *shape: int) -> torch.Tensor:
        """Normal."""
        return torch.randn(*shape, device=self.device, generator=self._generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Between 0 and 1."""
        return torch.rand(*shape, device=self.device, generator=self._generator)


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to compute the layer, and who carries which token in it (None: nobody)."""

    build: Callable[[Site], Layer]
    routing: Callable[[Site, torch.Tensor], Routing] | None


class Wrong(Exception):
    """A method's result is not the layer's."""


def methods_for(experts: int, backends: Sequence[Backend], vllm: Path | None = None) -> dict[str, Method]:
    """Everything that is measured, by name. `vllm`: a folder with its files."""
    found = {
        BASE: Method(lambda site: site.base, None),
        STATIC: Method(lambda site: static_lora(site.base, site.stack.a_ERI[0], site.stack.b_ERO[0]), first_expert),
        "one LoRA (PEFT)": Method(
            lambda site: only_layer(with_adapters(site.base, site.stack.a_ERI[:1], site.stack.b_ERO[:1])), first_expert
        ),
        "Arrow (PEFT)": Method(
            lambda site: add(site.base, arrow(site.stack.a_ERI, site.stack.b_ERO, TOP_K)), arrow_routing
        ),
        "X-LoRA layer (PEFT), scalings given": Method(
            lambda site: x_lora(site.base, site.stack.a_ERI, site.stack.b_ERO, site.scalings_NE, TOP_K),
            scalings_routing,
        ),
        "loop over experts (official steps)": Method(
            lambda site: split_loop(site.base, site.stack, site.router), own_routing
        ),
    }
    if experts not in X_LORA_EXPERTS:
        del found["X-LoRA layer (PEFT), scalings given"]
    if vllm is not None:
        from vllm_layer import VllmUpdate
        from vllm_layer import load as load_vllm

        kernels = load_vllm(vllm)
        found["vLLM's fused_moe_lora, choice and sorting given"] = Method(
            lambda site: VllmUpdate(kernels, site.base, site.stack.a_ERI, site.stack.b_ERO, site.router), own_routing
        )
    for backend in backends:
        found[f"ours, {backend}"] = Method(partial(ours, backend=backend), own_routing)
    return found


def ours(site: Site, backend: Backend) -> Layer:
    return cast(Layer, RoutedLinear(site.base, site.stack, site.router, backend).to_base())


def own_routing(site: Site, x_NI: torch.Tensor) -> Routing:
    return cast(Routing, site.router(x_NI))


def first_expert(_: Site, x_NI: torch.Tensor) -> Routing:
    ids_NK = torch.zeros(len(x_NI), 1, dtype=torch.int64, device=x_NI.device)
    return Routing(torch.ones_like(ids_NK, dtype=torch.float32), ids_NK)


def arrow_routing(site: Site, x_NI: torch.Tensor) -> Routing:
    return cast(Routing, ArrowPeft(site.stack, RouterConfig(top_k=TOP_K)).to(x_NI.device)(x_NI))


def scalings_routing(site: Site, x_NI: torch.Tensor) -> Routing:
    top_NK, ids_NK = site.scalings_NE[: len(x_NI)].float().topk(TOP_K)
    return Routing(top_NK.softmax(dim=1), ids_NK)


def check(site: Site, method: Method, layer: Layer, x_NI: torch.Tensor) -> float:
    """Compare with fp64.

    Returns:
        The largest token's error, as a share of the largest token's output.

    Raises:
        Wrong: by more than rounding explains.
    """
    expected_NO = x_NI.double() @ site.base.weight.double().T
    if method.routing is not None:
        weights_NK, ids_NK = method.routing(site, x_NI)
        factors = site.stack.a_ERI.double(), site.stack.b_ERO.double()
        routing, backend = Routing(weights_NK.double(), ids_NK), "reference" if len(x_NI) <= 64 else "dense"
        expected_NO += mix_loras(x_NI.double(), *factors, routing, backend=backend)
    error = float((layer(x_NI).double() - expected_NO).norm(dim=1).max() / expected_NO.norm(dim=1).max())
    if not error < TOLERANCE[x_NI.dtype]:
        raise Wrong(f"error {error:.2e} of the output")
    return error


def captured(calls: Sequence[Call]) -> Call:
    """A CUDA graph; a method that waits for the device is found out before it can spoil a capture."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return graph(calls)


def measure_cell(
    cell: Cell,
    sites: Sequence[Site],
    methods: dict[str, Method],
    layers: dict[str, list[Layer]],
    draw: Draw,
    rounds: int,
) -> list[dict[str, object]]:
    """Check, then time, every method on one shape."""
    inputs, outputs, experts, tokens = cell
    xs = [site.activations(tokens, draw) for site in sites]
    errors: dict[str, float] = {}
    peaks: dict[str, float] = {}
    replays: dict[tuple[str, str], Call] = {}
    for name, built in layers.items():
        calls = [partial(layer, x_NI) for layer, x_NI in zip(built, xs, strict=True)]
        try:
            errors[name] = check(sites[0], methods[name], built[0], xs[0])
            peaks[name] = peak_mib(calls[0], draw.device)
        except (Wrong, RuntimeError) as error:  # of memory, among others
            print(f"  WRONG, so without a time: {name}: {first_line(error)}", flush=True)
            continue
        replays[name, "eager"] = in_turn(calls)
        if draw.device == "cuda":
            try:
                replays[name, "graph"] = captured(calls)
            except RuntimeError as error:
                print(f"  no graph of {name}: {first_line(error)}", flush=True)
    times = {key: found * 1e6 / len(sites) for key, found in median_seconds(replays, rounds, draw.device).items()}
    static = times.get((STATIC, "graph" if draw.device == "cuda" else "eager"), float("nan"))
    return [
        {
            "device": device_name(draw.device), "torch": torch.__version__, "peft": peft.__version__, "inputs": inputs,
            "outputs": outputs, "experts": experts, "tokens": tokens, "method": name, "mode": mode,
            "microseconds": f"{found:.2f}", "ratio_to_one_lora": f"{found / static:.3f}",
            "error": f"{errors[name]:.1e}", "peak_mib": f"{peaks[name]:.1f}",
        }
        for (name, mode), found in times.items()
    ]  # fmt: skip


def first_line(error: Exception) -> str:
    return f"{type(error).__name__} {error}".splitlines()[0][:200]


def build(sites: Sequence[Site], methods: dict[str, Method]) -> dict[str, list[Layer]]:
    """Every method's layers, one for each site; a method that cannot be built is reported and left out."""
    found: dict[str, list[Layer]] = {}
    for name, method in methods.items():
        try:
            found[name] = [method.build(site) for site in sites]
        except Exception as error:  # a peer's own; the others go on
            print(f"  not built: {name}: {first_line(error)}", flush=True)
    return found


def cells(args: argparse.Namespace) -> Iterator[tuple[int, int, int]]:
    """In-features, out-features and experts of all shapes."""
    for shape in args.shapes:
        inputs, outputs = map(int, shape.split("x"))
        for experts in args.experts:
            yield inputs, outputs, experts


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    """All shapes; prints what it finds and writes rows as they come."""
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    draw, begin = Draw(args.device, dtype), time.perf_counter()
    for inputs, outputs, experts in cells(args):
        # as many as exceed the L2 cache twice; 12 at most
        copies = min(12, max(2, -(-(100 << 20) // (2 * inputs * outputs)))) if args.device == "cuda" else 2
        sites = [Site.random(inputs, outputs, experts, max(args.tokens), draw) for _ in range(copies)]
        methods = methods_for(experts, args.backends, args.vllm)
        layers = build(sites, methods)
        for tokens in args.tokens:
            if time.perf_counter() - begin > args.seconds:
                print("out of time; the rest is left out", flush=True)
                return
            rows = measure_cell((inputs, outputs, experts, tokens), sites, methods, layers, draw, args.rounds)
            print(
                f"[{time.perf_counter() - begin:5.0f} s] {inputs}x{outputs} N {experts} T {tokens}: "
                + "  ".join(f"{r['method']}, {r['mode']} {r['microseconds']} ({r['ratio_to_one_lora']})" for r in rows),
                flush=True,
            )
            if args.out and rows:
                replace_rows(args.out, rows, "device", "inputs", "outputs", "experts", "tokens")
            if args.device == "cuda":
                torch.cuda.empty_cache()
        del sites, layers


def compile_first(args: argparse.Namespace) -> None:
    """Compile with all cores what our layers will launch."""
    from compile_kernels import compile_layers

    begin = time.perf_counter()
    number = compile_layers(
        [
            {"tokens": tokens, "experts": experts, "inputs": inputs, "outputs": outputs}
            for inputs, outputs, experts in cells(args)
            for tokens in args.tokens
        ]
    )
    print(f"[{time.perf_counter() - begin:5.0f} s] {number} kernels compiled", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shapes", nargs="+", help="INPUTSxOUTPUTS")
    parser.add_argument("--experts", type=int, nargs="+")
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="of ours")
    parser.add_argument("--vllm", type=Path, help="folder in which vLLM's files lie")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seconds", type=float, default=420, help="begin no shape after this; compiling comes before")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    tiny = args.device == "cpu"
    args.shapes = args.shapes or (["64x96"] if tiny else SHAPES)
    args.experts = args.experts or ([4, 9] if tiny else [166, 36, 8, 4])
    args.tokens = args.tokens or ([1, 17] if tiny else [1, 32, 4096])
    args.backends = args.backends or (["auto"] if tiny else ["triton"])
    args.rounds = args.rounds or (2 if tiny else 9)
    if not tiny and "triton" in args.backends:
        compile_first(args)
    measure(args)


if __name__ == "__main__":
    main()
