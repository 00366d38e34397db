"""Recording folders made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from helpers.results import add_row
from phatgoose.analysis.recording import RecordingHeader
from phatgoose.analysis.recording_folder import RecordingFolder
from phatgoose.analysis.task_routing import TaskRouting

EXPERTS = ("a", "b", "c", "d")
# two layers of two kinds
SITES = tuple(f"model.layers.{layer}.{kind}" for layer in range(2) for kind in ("self_attn.q_proj", "mlp.up_proj"))


def pool_of(seed: int) -> str:
    return hashlib.sha256(f"pool {seed}".encode()).hexdigest()


def header(seed: int = 0, **changes: Any) -> RecordingHeader:
    fields: dict[str, Any] = {
        "method": "phatgoose",
        "router": {"router": "phatgoose", "top_k": 2},
        "pool": pool_of(seed),
        "pool_name": f"pool{seed}",
        "base": "tiny",
        "dtype": "fp32",
        "encoder_decoder": False,
        "text": {"separator": "\n"},
        "limit": 5,
        "seed": seed,
        "experts": EXPERTS,
        "sites": SITES,
        "versions": {},
    }
    return RecordingHeader(**fields | changes)


def task_routing(
    suite: str, task: str, weights: Any, experts: tuple[str, ...] = EXPERTS, **changes: Any
) -> TaskRouting:
    """`weights`: of each expert, the same at all sites, or (M, E)."""
    weights_ME = np.array(weights, dtype=np.float64)
    if weights_ME.ndim == 1:
        weights_ME = np.tile(weights_ME, (len(SITES), 1))
    masked = (task,) if suite == "leave-one-out" else ()
    num_sites = len(weights_ME)
    fields: dict[str, Any] = {
        "suite": suite,
        "task": task,
        "data": "d" * 64,
        "num_rows": 5,
        "num_tokens": 100,
        "masked": masked,
        "weights_ME": weights_ME,
        "entropy_all_M": np.full(num_sites, 1.0),
        "entropy_chosen_M": np.full(num_sites, 0.5),
        "usable_M": np.full(num_sites, float(len(experts) - len(masked))),
    }
    return TaskRouting(**fields | changes)


def make_recording(folder: Path, tasks: Mapping[tuple[str, str], Any], seed: int = 0, **changes: Any) -> Path:
    """`tasks`: (suite, task) -> weights, or a TaskRouting."""
    made = header(seed, **changes)
    recording = RecordingFolder(folder, made)
    with recording.writing():
        for (suite, task), weights in tasks.items():
            done = isinstance(weights, TaskRouting)
            recording.add(weights if done else task_routing(suite, task, weights, made.experts))
    return folder


TASKS = {
    "rte": [0.4, 0.2, 0.2, 0.2],
    "cb": [0.1, 0.6, 0.2, 0.1],
    "copa": [0.25, 0.25, 0.25, 0.25],
    "wic": [0.5, 0.5, 0.0, 0.0],
    "wsc": [0.3, 0.3, 0.3, 0.1],
}
BEST = {"rte": "a", "cb": "a", "copa": "b", "wic": "c", "wsc": "b"}
SCORES = {"rte": 5, "cb": 6, "copa": 4, "wic": 8, "wsc": 3}  # right ones of ten, the router's


def right(number: int) -> list[int]:
    return [1] * number + [0] * (10 - number)


def evaluate(folder: Path, seed: int = 0, suite: str = "t0ho", skip: tuple[str, ...] = (), **changes: Any) -> Path:
    """The best expert has 7 of ten, the others 2; the base has 3."""
    options = {"seed": seed, "pool": pool_of(seed)} | changes
    for task, score in SCORES.items():
        add_row(folder, suite, task, "phatgoose", right(score), **options)
        if "base" not in skip:
            add_row(folder, suite, task, "base", right(3), **options)
        for expert in EXPERTS:
            if expert not in skip:
                add_row(folder, suite, task, f"expert:{expert}", right(7 if expert == BEST[task] else 2), **options)
    return folder
