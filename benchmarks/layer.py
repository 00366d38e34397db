"""One routed layer beside its peers, measured side by side in one run.

    python benchmarks/layer.py --out benchmarks/rows/layer.csv

Methods: the base linear, PEFT with one LoRA, PEFT's Arrow layer, a loop over
the experts (a search for each), and ours with each backend; all of them
with the base layer and, where there is any, with the routing. fp32, rank 16,
top-2. Medians of interleaved rounds; `peak_mib` is what a call allocates at most.
PEFT's Arrow layer and ours are also measured without the base layer.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from measuring import device_name, milliseconds, peak_mib, write_rows
from peer_layers import Layer, add, arrow, loop, with_adapters
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import mix_loras
from phatgoose.routers.base import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.linear import RoutedLinear

RANK, TOP_K = 16, 2


def main() -> None:
    """Measure the grid and append its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 36, 166])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for features in args.features:
        for experts in args.experts:
            methods = make_methods(features, experts)
            for tokens in args.tokens:
                x = torch.randn(1, tokens, features)
                calls = {name: partial(method, x) for name, method in methods.items()}
                times = milliseconds(calls, args.rounds)
                peaks = {name: peak_mib(call) for name, call in calls.items()}
                rows += [
                    row(features, experts, tokens, name, ms, times["base"], peaks[name]) for name, ms in times.items()
                ]
                print(
                    f"d {features} N {experts} T {tokens}: "
                    + "  ".join(f"{n} {t:.3f} ms {peaks[n]:.1f} MiB" for n, t in times.items()),
                    flush=True,
                )
    if args.out:
        write_rows(args.out, rows)


def make_methods(features: int, experts: int) -> dict[str, Layer]:
    """Layers with random weights; all share the base layer."""
    base = nn.Linear(features, features, bias=False)
    a_ERI = torch.randn(experts, RANK, features) / features**0.5
    b_ERO = torch.randn(experts, RANK, features) / RANK**0.5
    stack = SiteStack(
        a_ERI=a_ERI,
        b_ERO=b_ERO,
        gates_EI=torch.randn(experts, features),
        present_E=torch.ones(experts, dtype=torch.bool),
    )
    router = Phatgoose(stack, RouterConfig(top_k=TOP_K))
    arrow_layer = arrow(a_ERI, b_ERO, TOP_K)
    methods: dict[str, Layer] = {
        "base": base,
        "one LoRA (PEFT)": with_adapters(nn.Linear(features, features, bias=False), a_ERI[:1], b_ERO[:1]),
        "Arrow (PEFT)": add(base, arrow_layer),
        "Arrow (PEFT), without the base": arrow_layer,
        "loop over experts": loop(base, stack, router),
    }
    for backend in ("gather", "dense", "grouped", "auto"):
        methods[f"ours, {backend}"] = RoutedLinear(base, stack, router, backend)
    methods["ours, without the base"] = update(stack, router)
    return methods


def update(stack: SiteStack, router: Router) -> Layer:
    """Our routing and mixing, as in `RoutedLinear`."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        return mix_loras(x_NI, stack.a_ERI, stack.b_ERO, router(x_NI)).view(x.shape)

    return forward


def row(
    features: int, experts: int, tokens: int, method: str, ms: float, base_ms: float, mib: float
) -> dict[str, object]:
    """One line of the CSV."""
    return {
        "device": device_name(),
        "torch": torch.__version__,
        "features": features,
        "experts": experts,
        "tokens": tokens,
        "method": method,
        "milliseconds": f"{ms:.4f}",
        "ratio_to_base": f"{ms / base_ms:.2f}",
        "peak_mib": f"{mib:.2f}",
    }


if __name__ == "__main__":
    main()
