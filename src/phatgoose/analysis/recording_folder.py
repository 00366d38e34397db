"""Writes the recording folder of `phatgoose record`; `phatgoose.analysis.recording` reads it.

After each task its suite's file is replaced atomically, so that a killed run
leaves whole tasks or none.

Axes: T tasks, M sites, E experts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from safetensors.numpy import save_file

from phatgoose.analysis.recording import (
    COLUMNS,
    FORMAT,
    HEADER_FILE,
    TENSORS,
    RecordingHeader,
    read_recording,
    suite_file,
)
from phatgoose.analysis.task_routing import TaskRouting
from phatgoose.errors import ResultsError
from phatgoose.files import replacing, write_json

# header fields in which a resumed run may differ from the one before
FREE = ("pool_name", "versions")


class RecordingFolder:
    """A recording folder that is being written.

    Args:
        folder: the folder; created if it does not exist.
        header: what all tasks of the recording have in common.

    Raises:
        ResultsError: `folder` is not a folder, holds another recording, or is damaged.
    """

    def __init__(self, folder: Path, header: RecordingHeader) -> None:
        self.folder = folder
        self.header = header
        self.tasks: dict[tuple[str, str], TaskRouting] = {}
        if folder.exists() and not folder.is_dir():
            raise ResultsError(f"{folder} is not a folder", expected="a recording, or a new folder", fix="--out OTHER")
        if (folder / HEADER_FILE).exists():
            earlier = read_recording(folder)
            self.tasks = earlier.tasks
            fixed = [name for name in asdict(header) if name not in FREE]
            unequal = [name for name in fixed if getattr(earlier.header, name) != getattr(header, name)]
            if unequal:
                raise ResultsError(
                    f"{folder} holds a recording with another {unequal[0]}",
                    found=str(getattr(earlier.header, unequal[0]))[:120],
                    expected=str(getattr(header, unequal[0]))[:120],
                    fix="--out OTHER, or the earlier settings",
                )

    def has(self, suite: str, task: str, data: str) -> bool:
        """Whether a task is finished.

        Args:
            suite, task: names.
            data: sha256 of the task's rows.

        Raises:
            ResultsError: the task was recorded with other rows.
        """
        recorded = self.tasks.get((suite, task))
        if recorded is not None and recorded.data != data:
            raise ResultsError(
                f"{self.folder} has {suite}/{task} with other rows",
                found=f"data {recorded.data[:12]}",
                expected=f"data {data[:12]}",
                fix="--out OTHER, or the earlier data",
            )
        return recorded is not None

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Lock the folder while tasks are added.

        Raises:
            ResultsError: another process has locked it.
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
            for unfinished in self.folder.glob(".*.safetensors.*"):  # left by a killed run
                unfinished.unlink()
            if not (self.folder / HEADER_FILE).exists():
                write_json(self.folder / HEADER_FILE, {"format": FORMAT, **asdict(self.header)})
            yield
        finally:
            lock.release()

    def add(self, routing: TaskRouting) -> None:
        """Write a finished task; its suite's file is replaced atomically."""
        self.tasks[routing.suite, routing.task] = routing
        tasks = [one for (suite, _), one in self.tasks.items() if suite == routing.suite]
        tensors = {name: np.stack([getattr(one, field) for one in tasks]) for name, field in TENSORS.items()}
        columns = [{name: getattr(one, name) for name in COLUMNS} for one in tasks]
        with replacing(self.folder / suite_file(routing.suite)) as temporary:
            save_file(
                {name: values.astype(np.float16) for name, values in tensors.items()},
                temporary,
                # a single entry, because safetensors does not keep the order of several
                metadata={"recording": json.dumps({"format": FORMAT, "tasks": columns})},
            )
