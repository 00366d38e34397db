"""Times of CUDA-graph replays and of plain calls, measured side by side; on a CPU plain calls only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Call = Callable[[], object]
Key = TypeVar("Key", bound=Hashable)
# of a method in one round: replays until so many seconds are full, at most so many
_MOST_REPEATS, _SECONDS_A_ROUND = 4, 0.02


@torch.no_grad()
def microseconds(methods: Mapping[str, Sequence[Call]], rounds: int, device: str) -> dict[str, float]:
    """Median time of one call.

    Args:
        methods: name -> calls that do the same on different tensors; one graph holds them all, one after the other,
            so that a call finds in the cache only what a layer of a model would.
        rounds: a round replays every method once.
        device: "cuda" or "cpu".
    """
    replays = {name: graph(calls) if device == "cuda" else in_turn(calls) for name, calls in methods.items()}
    times = median_seconds(replays, rounds, device)
    return {name: found * 1e6 / len(methods[name]) for name, found in times.items()}


@torch.no_grad()
def median_seconds(replays: Mapping[Key, Call], rounds: int, device: str) -> dict[Key, float]:
    """Median time of each; a round goes through all. What runs out of memory is reported and left out."""
    times: dict[Key, list[float]] = {key: [] for key in replays}
    for _ in range(rounds + 2):  # the first two warm up
        for key in list(times):
            try:
                times[key].append(_seconds(replays[key], device, times[key]))
            except torch.OutOfMemoryError:
                print(f"out of memory, left out: {key}", flush=True)
                del times[key]
                torch.cuda.empty_cache()
    return {key: statistics.median(found[2:]) for key, found in times.items()}


def in_turn(calls: Sequence[Call]) -> Call:
    """Plain calls, one after the other."""

    def run() -> None:
        for call in calls:
            call()

    return run


def graph(calls: Sequence[Call]) -> Call:
    """Warmed up on a stream of its own, then captured."""
    before = torch.cuda.current_stream()
    stream = torch.cuda.Stream()
    stream.wait_stream(before)
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    before.wait_stream(stream)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            kept = [call() for call in calls]
    finally:
        torch.cuda.set_stream(before)  # a capture that fails stays on its own
    torch.cuda.synchronize()

    def replay() -> None:
        captured.replay()

    replay.kept = kept  # type: ignore[attr-defined]  # outputs of a graph live as long as it
    return replay


def _seconds(replay: Call, device: str, earlier: Sequence[float]) -> float:
    if device != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # several replays back to back: the gap before the first is not the layer's
    repeats = max(1, min(_MOST_REPEATS, int(_SECONDS_A_ROUND / earlier[-1]))) if earlier else 1
    start_event.record()
    for _ in range(repeats):
        replay()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / repeats
