"""One routed layer beside its peers, measured side by side in one run.

    python benchmarks/layer.py --out benchmarks/rows/layer.csv

Methods: the base linear, PEFT with one LoRA, PEFT's Arrow layer, a loop over
the experts (the official code's way), and ours with each backend; all of them
with the base layer and, where there is any, with the routing. fp32, rank 16,
top-2. Medians of interleaved rounds; `peak_mib` is what a call allocates at most.
PEFT's Arrow layer and ours are also measured without the base layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from measuring import device_name, milliseconds, peak_mib, write_rows
from peft import ArrowConfig, LoraConfig, get_peft_model
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import nn

from phatgoose.config import RouterConfig
from phatgoose.kernels import mix_loras
from phatgoose.routed_linear import RoutedLinear
from phatgoose.routers import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.stack import SiteStack

RANK, TOP_K = 16, 2
Layer = Callable[[torch.Tensor], torch.Tensor]


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
    arrow_layer = arrow(a_ERI, b_ERO)
    methods: dict[str, Layer] = {
        "base": base,
        "one LoRA (PEFT)": one_lora(features),
        "Arrow (PEFT)": add(base, arrow_layer),
        "Arrow (PEFT), without the base": arrow_layer,
        "loop over experts": loop(base, stack, router),
    }
    for backend in ("gather", "dense", "grouped", "auto"):
        methods[f"ours, {backend}"] = RoutedLinear(base, stack, router, backend)
    methods["ours, without the base"] = update(stack, router)
    return methods


def add(base: nn.Module, layer: Layer) -> Layer:
    """A base layer and an update."""
    return lambda x: base(x) + layer(x)


def update(stack: SiteStack, router: Router) -> Layer:
    """Our routing and mixing, as in `RoutedLinear`."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1])
        return mix_loras(x_NI, stack.a_ERI, stack.b_ERO, *router(x_NI)).view(x.shape)

    return forward


def one_lora(features: int) -> Layer:
    """PEFT's own layer with one adapter."""
    model = nn.Sequential(nn.Linear(features, features, bias=False))
    return get_peft_model(model, LoraConfig(r=RANK, target_modules=["0"], init_lora_weights=False))


def arrow(a_ERI: torch.Tensor, b_ERO: torch.Tensor) -> Layer:
    """PEFT's Arrow layer on the same experts (it does not hold the base layer)."""
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
    return lambda x: layer(x, lora_a, lora_b, dropout, scaling)


def loop(base: nn.Module, stack: SiteStack, router: Router) -> Layer:
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
