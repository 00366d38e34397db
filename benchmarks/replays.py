"""Times of CUDA-graph replays, measured side by side; on a CPU plain calls, for a rehearsal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


@torch.no_grad()
def microseconds(methods: Mapping[str, Sequence[Call]], rounds: int, device: str) -> dict[str, float]:
    """Median time of one call.

    Args:
        methods: name -> calls that do the same on different tensors; one graph holds them all, one after the other,
            so that a call finds in the cache only what a layer of a model would.
        rounds: a round replays every method once.
        device: "cuda" or "cpu".
    """
    replays = {name: _graph(calls) if device == "cuda" else _all(calls) for name, calls in methods.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds + 2):  # the first two warm up
        for name, replay in replays.items():
            times[name].append(_seconds(replay, device) / len(methods[name]))
    return {name: statistics.median(found[2:]) * 1e6 for name, found in times.items()}


def _all(calls: Sequence[Call]) -> Call:
    def run() -> None:
        for call in calls:
            call()

    return run


def _graph(calls: Sequence[Call]) -> Call:
    """Warmed up on a stream of its own, then captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    torch.cuda.synchronize()

    def replay() -> None:
        graph.replay()

    replay.kept = kept  # type: ignore[attr-defined]  # outputs of a graph live as long as it
    return replay


def _seconds(replay: Call, device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        replay()
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # several replays back to back: the gap before the first is not the layer's
    repeats = 4
    start_event.record()
    for _ in range(repeats):
        replay()
    end_event.record()
    end_event.synchronize()
    return start_event.elapsed_time(end_event) / 1e3 / repeats
