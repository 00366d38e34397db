"""Seconds and device of each stage."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from filelock import FileLock


@contextmanager
def timed(args: argparse.Namespace, seed: int, stage: str) -> Iterator[None]:
    """Print a stage's seconds, and append them to times.jsonl; a stage that was finished before takes few."""
    start = time.monotonic()
    yield
    row = {"seed": seed, "stage": stage, "seconds": round(time.monotonic() - start, 1), "device": "CPU"}
    if torch.cuda.is_available():
        row["device"] = torch.cuda.get_device_name()
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 1)
        torch.cuda.reset_peak_memory_stats()
    print(json.dumps(row), flush=True)
    with FileLock(args.out / ".times.lock"), (args.out / "times.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
