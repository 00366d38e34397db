"""Recording folders made by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from phatgoose.analysis.recording import RecordingFolder, RecordingHeader
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
