"""One routed layer beside its peers, measured side by side in one run.

    python benchmarks/layer.py --out benchmarks/rows/layer.csv

Methods: the base linear, PEFT with one LoRA, PEFT's Arrow layer, a loop over
the experts (the official code's way), and ours with each backend; all of them
with the base layer and, where there is any, with the routing. fp32, rank 16,
top-2. Rounds go through all methods in turn, so that a busy machine slows all
of them; the number is the median of the rounds.
"""

from __future__ import annotations

import argparse
import csv
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import ArrowConfig, LoraConfig, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.routed import RoutedLinear
from phatgoose.routers import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.stack import SiteStack

RANK, TOP_K = 16, 2
Method = Callable[[torch.Tensor], torch.Tensor]


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
                times = measure(methods, torch.randn(1, tokens, features), args.rounds)
                rows += [row(features, experts, tokens, name, ms, times["base"]) for name, ms in times.items()]
                print(f"d {features} N {experts} T {tokens}: " + "  ".join(f"{n} {t:.3f}" for n, t in times.items()))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def make_methods(features: int, experts: int) -> dict[str, Method]:
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
    methods: dict[str, Method] = {
        "base": base,
        "one LoRA (PEFT)": one_lora(features),
        "Arrow (PEFT)": arrow(base, a_ERI, b_ERO),
        "loop over experts": loop(base, stack, router),
    }
    for backend in ("gather", "dense", "grouped", "auto"):
        methods[f"ours, {backend}"] = RoutedLinear(base, stack, router, backend)
    return methods


def one_lora(features: int) -> Method:
    """PEFT's own layer with one adapter."""
    model = nn.Sequential(nn.Linear(features, features, bias=False))
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))


def arrow(base: nn.Module, a_ERI: torch.Tensor, b_ERO: torch.Tensor) -> Method:
    """PEFT's Arrow layer on the same experts."""
    config = ArrowConfig(top_k=TOP_K)
    config.task_adapter_names = [f"task_{e}" for e in range(len(a_ERI))]
    config.gks_adapter_names = []
    layer = ArrowLoraLinearLayer(a_ERI.shape[2], config)
    lora_a = {name: SimpleNamespace(weight=a) for name, a in zip(config.task_adapter_names, a_ERI, strict=True)}
    lora_b = {
        name: SimpleNamespace(weight=b.T.contiguous()) for name, b in zip(config.task_adapter_names, b_ERO, strict=True)
    }
    layer.build_prototypes(lora_a, lora_b)
    dropout, scaling = nn.Identity(), dict.fromkeys(lora_a, 1.0)
    return lambda x: base(x) + layer(x, lora_a, lora_b, dropout, scaling)


def loop(base: nn.Module, stack: SiteStack, router: Router) -> Method:
    """For each expert: find its tokens, two products, add."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        x_NI = x.view(-1, x.shape[-1])
        y_NO = base(x_NI)
        weights_NK, expert_ids_NK = router(x_NI)
        for e in range(len(stack.a_ERI)):
            tokens, slots = torch.nonzero(expert_ids_NK == e, as_tuple=True)
            h = (x_NI[tokens] @ stack.a_ERI[e].T) * weights_NK[tokens, slots].unsqueeze(1)
            y_NO.index_add_(0, tokens, h @ stack.b_ERO[e])
        return y_NO.view(*x.shape[:-1], -1)

    return forward


@torch.no_grad()
def measure(methods: dict[str, Method], x: torch.Tensor, rounds: int) -> dict[str, float]:
    """Median milliseconds of each method."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 1):  # the first round warms up
        for name, method in methods.items():
            times[name].append(once(method, x))
    return {name: statistics.median(found[1:]) * 1e3 for name, found in times.items()}


def once(method: Method, x: torch.Tensor) -> float:
    """Seconds of one call, averaged over as many as fill 20 ms."""
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < 0.02 or calls == 0:
        method(x)
        calls += 1
    return spent / calls


def row(features: int, experts: int, tokens: int, method: str, ms: float, base_ms: float) -> dict[str, object]:
    """One line of the CSV."""
    return {
        "device": f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "features": features,
        "experts": experts,
        "tokens": tokens,
        "method": method,
        "milliseconds": f"{ms:.4f}",
        "ratio_to_base": f"{ms / base_ms:.2f}",
    }


if __name__ == "__main__":
    main()
