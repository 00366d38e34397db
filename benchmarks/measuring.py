"""Time and memory of calls, measured side by side."""

from __future__ import annotations

import csv
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

Method = Callable[[], Any]


@torch.no_grad()
def milliseconds(methods: Mapping[str, Method], rounds: int) -> dict[str, float]:
    """Median over rounds; a round goes through all methods, so that a busy machine slows all of them."""
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 1):  # the first round warms up
        for name, method in methods.items():
            times[name].append(_seconds(method))
    return {name: statistics.median(found[1:]) * 1e3 for name, found in times.items()}


@torch.no_grad()
def peak_mib(method: Method, device: str = "cpu") -> float:
    """The most memory that a call holds at a time, beyond what it was given (its result included)."""
    method()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        method()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = method()  # alive until the profile ends
    # The public event list drops the order of allocations; the raw one has it.
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    del kept
    return most / 2**20


def device_name(device: str = "cpu") -> str:
    """What the rows were measured on."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return f"{model}, {torch.get_num_threads()} threads"


def write_rows(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write a CSV, replacing an older one; the last row says which columns there are."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[-1]))
        writer.writeheader()
        writer.writerows(rows)


def replace_rows(path: Path, rows: Sequence[Mapping[str, object]], *keys: str) -> None:
    """Write a CSV, keeping an older one's rows that differ from every new one in one of the `keys`."""
    old: list[dict[str, str]] = []
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    new = {tuple(str(row[key]) for key in keys) for row in rows}
    write_rows(path, [*(row for row in old if tuple(row.get(key, "") for key in keys) not in new), *rows])


def _seconds(method: Method) -> float:
    """Seconds of one call, averaged over as many as fill 20 ms."""
    start, calls = time.perf_counter(), 0
    while (spent := time.perf_counter() - start) < 0.02 or calls == 0:
        method()
        calls += 1
    return spent / calls
