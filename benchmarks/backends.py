"""Where the backends of `mix_loras` cross, for the rule of "auto" (`phatgoose.kernels.choose`).

    python benchmarks/backends.py --out benchmarks/rows/backends.csv

fp32, rank 16, top-2, routing left out. Prints for each shape the fastest
backend, the one that "auto" takes, and how much slower that one is.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import torch
from measuring import device_name, milliseconds, write_rows

from phatgoose.kernels import Backend, Routing, backend_for, mix_loras, runs_numba

BACKENDS: tuple[Backend, ...] = ("vectors", "gather", "grouped", "dense", "numba")


def main() -> None:
    """Measure the grid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, nargs="+", default=[576, 2048])
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 8, 16, 36, 166])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64, 128, 512])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    rows = []
    for features in args.features:
        for experts in args.experts:
            for tokens in args.tokens:
                rows += measure(features, experts, tokens, args)
    if args.out:
        write_rows(args.out, rows)


def measure(features: int, experts: int, tokens: int, args: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one shape."""
    x_NI = torch.randn(tokens, features)
    a_ERI = torch.randn(experts, args.rank, features)
    b_ERO = torch.randn(experts, args.rank, features)
    ids_NK = torch.rand(tokens, experts).topk(args.top_k).indices
    routing = Routing(torch.full((tokens, args.top_k), 1 / args.top_k), ids_NK)
    calls = {name: partial(mix_loras, x_NI, a_ERI, b_ERO, routing, backend=name) for name in BACKENDS}
    times = milliseconds(calls, args.rounds)
    best = min(times, key=lambda name: times[name])
    auto = backend_for(tokens, args.top_k, experts, args.rank, on_cpu=True, numba=runs_numba(torch.float32))
    print(
        f"d {features} N {experts} T {tokens}: "
        + "  ".join(f"{name} {ms:.3f}" for name, ms in times.items())
        + f"  best {best}, auto {auto} ({times[auto] / times[best]:.2f} x)",
        flush=True,
    )
    return [
        {
            "device": device_name(),
            "torch": torch.__version__,
            "features": features,
            "experts": experts,
            "tokens": tokens,
            "rank": args.rank,
            "top_k": args.top_k,
            "backend": name,
            "milliseconds": f"{ms:.4f}",
            "ratio_to_best": f"{ms / times[best]:.2f}",
        }
        for name, ms in times.items()
    ]


if __name__ == "__main__":
    main()
