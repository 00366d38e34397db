"""How fast this CPU reads memory: one tensor, larger than the caches, summed with all of PyTorch's threads.

    python benchmarks/bandwidth.py --out benchmarks/rows/bandwidth.csv

`experts_gb` of a prefill (rows of `model.py`) divided by it is the least time that reading gates and factors takes.
Rows replace those of the same device and threads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import device_name, milliseconds, replace_rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write a row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=2.0)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    numbers = torch.ones(int(args.gb * 1e9) // 4)
    time_ms = milliseconds({"sum": numbers.sum}, args.rounds)["sum"]
    row = {
        "device": device_name("cpu"),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "gb": args.gb,
        "gb_a_second": f"{args.gb / time_ms * 1e3:.1f}",
    }
    print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    if args.out:
        replace_rows(args.out, [row], "device", "threads")


if __name__ == "__main__":
    main()
