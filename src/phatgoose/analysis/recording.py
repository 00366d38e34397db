"""Routing recorded by `phatgoose record`, read back; docs/analysis.md describes the formats.

    recording.json         what was recorded, and with which settings
    <suite>.safetensors    the routing of the suite's finished tasks

Axes: T tasks, M sites, E experts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from phatgoose.analysis.task_routing import TaskRouting
from phatgoose.errors import ResultsError
from phatgoose.results.names import SUITES

HEADER_FILE = "recording.json"
FORMAT = 1
# tensor of a suite's file -> field of TaskRouting; stored as float16, because weights lie between 0 and 1
TENSORS = {
    "weights_TME": "weights_ME",
    "entropy_all_TM": "entropy_all_M",
    "entropy_chosen_TM": "entropy_chosen_M",
    "usable_TM": "usable_M",
}
# the other fields of TaskRouting, in the file's metadata
COLUMNS = ("task", "data", "num_rows", "num_tokens", "masked")


@dataclass(frozen=True, kw_only=True)
class RecordingHeader:
    """What all tasks of a recording have in common.

    Attributes:
        method: the router as `phatgoose eval` names it, such as "phatgoose top_k=1".
        router: all options of the router.
        pool: fingerprint of the pool.
        pool_name: its name, for people.
        base: name of the base model.
        dtype: dtype of the base model's weights.
        encoder_decoder: whether the base model is an encoder-decoder.
        text: settings with which rows became tokens.
        limit: most rows of a task.
        seed: random seed of the run.
        experts: names, by expert id.
        sites: names, in the order of the model.
        versions: versions of packages.
    """

    method: str
    router: dict[str, Any]
    pool: str
    pool_name: str
    base: str
    dtype: str
    encoder_decoder: bool
    text: dict[str, Any]
    limit: int
    seed: int
    experts: tuple[str, ...]
    sites: tuple[str, ...]
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Recording:
    """A recording folder that was read.

    Attributes:
        folder: the folder.
        header: what its tasks have in common.
        tasks: (suite, task) -> routing, in the order in which the tasks were recorded.
    """

    folder: Path
    header: RecordingHeader
    tasks: dict[tuple[str, str], TaskRouting]


def read_recording(folder: Path) -> Recording:
    """Read a recording folder.

    Raises:
        ResultsError: `folder` is not a recording, or is damaged.
    """
    header = _header(folder)
    tasks: dict[tuple[str, str], TaskRouting] = {}
    for suite in SUITES:
        path = folder / suite_file(suite)
        if path.is_file():
            tasks |= {(suite, one.task): one for one in _read_suite(path, suite, header)}
    return Recording(folder=folder, header=header, tasks=tasks)


def suite_file(suite: str) -> str:
    """Name of the file with a suite's routing."""
    return f"{suite}.safetensors"


def _header(folder: Path) -> RecordingHeader:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise ResultsError(
            f"{folder} is not a recording",
            found=f"no {HEADER_FILE}",
            expected="a folder that phatgoose record wrote",
            fix=f"phatgoose record POOL --suite t0ho --data DIR --out {folder}",
        )
    try:
        fields: Any = json.loads(path.read_text(encoding="utf-8"))
        if fields.pop("format") != FORMAT:
            raise ValueError("another format")
        header = RecordingHeader(**fields | {name: tuple(fields[name]) for name in ("experts", "sites")})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error
    return header


def _read_suite(path: Path, suite: str, header: RecordingHeader) -> list[TaskRouting]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata: Any = json.loads((file.metadata() or {})["recording"])
            if metadata["format"] != FORMAT:
                raise ValueError("another format")
            columns = metadata["tasks"]
            tensors = {name: file.get_tensor(name).astype(np.float64) for name in TENSORS}
        shape = (len(columns), len(header.sites))
        shapes = {name: (*shape, len(header.experts)) if name.endswith("E") else shape for name in TENSORS}
        if any(tensors[name].shape != shapes[name] for name in TENSORS):
            raise ValueError(f"shapes {[values.shape for values in tensors.values()]}, not {list(shapes.values())}")
        return [
            TaskRouting(
                suite=suite,
                **{name: column[name] for name in COLUMNS} | {"masked": tuple(column["masked"])},
                **{field: tensors[name][t] for name, field in TENSORS.items()},
            )
            for t, column in enumerate(columns)
        ]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ResultsError:
    return ResultsError(
        f"{path} cannot be read",
        found=str(error) or type(error).__name__,
        expected=f"a recording of format {FORMAT}",
        fix="delete the file; the same phatgoose record command records its tasks again",
    )
