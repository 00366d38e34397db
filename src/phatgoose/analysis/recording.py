"""The folder that `phatgoose record` writes routing to; docs/analysis.md has its formats.

    recording.json         what was recorded, and how
    <suite>.safetensors    the routing of the suite's finished tasks

After each task its suite's file is replaced as one step, so that a killed run
leaves whole tasks or none.

Axes: T tasks, M sites, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from phatgoose.analysis.task_routing import TaskRouting
from phatgoose.errors import ResultsError
from phatgoose.files import replacing, write_json
from phatgoose.results.names import SUITES

HEADER_FILE = "recording.json"
FORMAT = 1
# of a file: name -> field of TaskRouting; float16, because weights lie between 0 and 1
TENSORS = {
    "weights_TME": "weights_ME",
    "entropy_all_TM": "entropy_all_M",
    "entropy_chosen_TM": "entropy_chosen_M",
    "usable_TM": "usable_M",
}
COLUMNS = ("task", "data", "num_rows", "num_tokens", "masked")


@dataclass(frozen=True, kw_only=True)
class RecordingHeader:
    """What all tasks of a folder have in common.

    Attributes:
        method: the router as `phatgoose eval` names it, such as "phatgoose top_k=1".
        router: all its options.
        pool: the pool's fingerprint; `pool_name` is for people.
        base, dtype: the base model.
        encoder_decoder: its kind.
        text: how rows became tokens.
        limit: rows of a task at most.
        seed: of the run.
        experts: names by expert id.
        sites: names, in the order of the model.
        versions: of packages.
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


# in which a run that goes on may differ from the one before
FREE = ("pool_name", "versions")


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One folder, read.

    Attributes:
        folder: where it lies.
        header: see there.
        tasks: by suite and task, in the order in which they were recorded.
    """

    folder: Path
    header: RecordingHeader
    tasks: dict[tuple[str, str], TaskRouting]


class RecordingFolder:
    """A folder to record into.

    Args:
        folder: made if it is not there.
        header: of what will be recorded.

    Raises:
        ResultsError: it is no folder, holds another recording, or is damaged.
    """

    def __init__(self, folder: Path, header: RecordingHeader) -> None:
        self.folder = folder
        self.header = header
        self.tasks: dict[tuple[str, str], TaskRouting] = {}
        if folder.exists() and not folder.is_dir():
            raise ResultsError(f"{folder} is no folder", expected="a recording, or nothing", fix="--out OTHER")
        if (folder / HEADER_FILE).exists():
            found = read_recording(folder)
            self.tasks = found.tasks
            odd = [name for name, value in asdict(header).items() if name not in FREE]
            odd = [name for name in odd if getattr(found.header, name) != getattr(header, name)]
            if odd:
                raise ResultsError(
                    f"{folder} holds a recording with another {odd[0]}",
                    found=str(getattr(found.header, odd[0]))[:120],
                    expected=str(getattr(header, odd[0]))[:120],
                    fix="--out OTHER, or the settings of before",
                )

    def has(self, suite: str, task: str, data: str) -> bool:
        """Whether a task is finished.

        Args:
            suite, task: which.
            data: sha256 of its rows.

        Raises:
            ResultsError: it is, with other rows.
        """
        found = self.tasks.get((suite, task))
        if found is not None and found.data != data:
            raise ResultsError(
                f"{self.folder} has {suite}/{task} with other rows",
                found=f"data {found.data[:12]}",
                expected=f"data {data[:12]}",
                fix="--out OTHER, or the data of before",
            )
        return found is not None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder while tasks are added.

        Raises:
            ResultsError: another process does.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise ResultsError(
                f"{self.folder} is being written to",
                found="another phatgoose record",
                fix="wait for it, or --out OTHER",
            ) from error
        try:
            for unfinished in self.folder.glob(".*.safetensors.*"):  # of a killed run
                unfinished.unlink()
            if not (self.folder / HEADER_FILE).exists():
                write_json(self.folder / HEADER_FILE, {"format": FORMAT, **asdict(self.header)})
            yield
        finally:
            lock.release()

    def add(self, routing: TaskRouting) -> None:
        """Write a finished task."""
        self.tasks[routing.suite, routing.task] = routing
        tasks = [one for (suite, _), one in self.tasks.items() if suite == routing.suite]
        tensors = {name: np.stack([getattr(one, field) for one in tasks]) for name, field in TENSORS.items()}
        columns = [{name: getattr(one, name) for name in COLUMNS} for one in tasks]
        with replacing(self.folder / _file(routing.suite)) as temporary:
            save_file(
                {name: values.astype(np.float16) for name, values in tensors.items()},
                temporary,
                # one entry, because safetensors writes several in any order
                metadata={"recording": json.dumps({"format": FORMAT, "tasks": columns})},
            )


def read_recording(folder: Path) -> Recording:
    """Read a folder.

    Raises:
        ResultsError: it is no recording, or damaged.
    """
    header = _header(folder)
    tasks: dict[tuple[str, str], TaskRouting] = {}
    for suite in SUITES:
        path = folder / _file(suite)
        if path.is_file():
            tasks |= {(suite, one.task): one for one in _read_suite(path, suite, header)}
    return Recording(folder=folder, header=header, tasks=tasks)


def _file(suite: str) -> str:
    return f"{suite}.safetensors"


def _header(folder: Path) -> RecordingHeader:
    path = folder / HEADER_FILE
    if not path.is_file():
        raise ResultsError(
            f"{folder} is no recording",
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
        wanted = {name: (*shape, len(header.experts)) if name.endswith("E") else shape for name in TENSORS}
        if any(tensors[name].shape != wanted[name] for name in TENSORS):
            raise ValueError(f"shapes {[values.shape for values in tensors.values()]}, not {list(wanted.values())}")
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
        fix="delete the file; the same phatgoose record again makes its tasks",
    )
