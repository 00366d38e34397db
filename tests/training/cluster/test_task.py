"""What a machine of a cluster does, without a cluster."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from helpers.checks import fails
from helpers.data import make_data
from helpers.models import llama, make_base
from helpers.training import make_task
from phatgoose.errors import BaseModelError, ClusterError
from phatgoose.experts.expert import Expert
from phatgoose.training.cluster.lock import group_lock
from phatgoose.training.cluster.task import GroupTask, run_group

HOLDER = """
import sys, time
from filelock import FileLock
lock = FileLock({path!r})
lock.acquire()
print("has it", flush=True)
time.sleep(600)
"""


@pytest.fixture
def task(tmp_path: Path) -> GroupTask:
    make_base(llama, tmp_path / "tiny-llama")
    return make_task(tmp_path, tuple(make_data(tmp_path / f"e{i}.jsonl", seed=i) for i in range(2)))


@contextmanager
def another_process_that_holds(path: Path) -> Iterator[int]:
    code = HOLDER.format(path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "has it\n"
            yield process.pid
        finally:
            process.kill()


def test_a_group_that_a_lost_process_still_trains(task: GroupTask) -> None:
    """It is left alone; when that process ends, however it does, the group is trained."""
    lock = task.out / ".ray" / "e0.lock"
    with another_process_that_holds(lock) as pid:
        outcome = run_group(task)
        assert type(outcome.error) is ClusterError
        for words in ("another process holds", str(lock), "e0.log says where"):
            assert words in str(outcome.error)
        assert {path.name for path in task.out.iterdir()} == {".ray"}
        os.kill(pid, signal.SIGKILL)
    assert run_group(task).error is None
    assert all(Expert(task.out / name).load_gate() for name in ("e0", "e1"))
    assert {path.name for path in task.out.iterdir()} == {".ray", "e0", "e1"}


def test_it_waits_for_a_process_that_makes_progress(tmp_path: Path) -> None:
    other = FileLock(tmp_path / "lock", thread_local=False)
    other.acquire()

    class Checkpoint(type(tmp_path)):  # type: ignore[misc]
        """Newer whenever one looks; before the fourth look its writer ends."""

        looks = 0

        def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
            Checkpoint.looks += 1
            if Checkpoint.looks == 4:
                other.release()
            file = tmp_path / "checkpoint"
            file.touch()
            os.utime(file, ns=(0, Checkpoint.looks))
            return file.stat()

    with group_lock(tmp_path / "lock", [Checkpoint(tmp_path / "checkpoint")], 0, tmp_path / "log"):
        assert Checkpoint.looks == 4
        taken = group_lock(tmp_path / "lock", [tmp_path / "none"], 0, tmp_path / "log")
        fails(ClusterError, "no checkpoint", action=taken.__enter__)
    with group_lock(tmp_path / "lock", [], 0, tmp_path / "log"):
        pass


def test_machines_that_cannot_take_part(task: GroupTask) -> None:
    elsewhere = replace(task, out=task.out / "elsewhere")
    for spoiled, error, words in (
        (replace(task, marker="of another run"), ClusterError, "another folder of this name"),
        (elsewhere, ClusterError, "no such folder"),
        (replace(task, version="0.0"), ClusterError, "expected: 0.0"),
        (replace(task, cwd=task.cwd / "none", base="./tiny-goose"), BaseModelError, "no such folder"),
    ):
        outcome = run_group(spoiled)
        assert type(outcome.error) is error
        assert words in str(outcome.error)
    assert {path.name for path in task.out.iterdir()} == {".ray"}


def test_the_log(task: GroupTask) -> None:
    """It says who trained what, and from where to where."""
    run_group(task)
    text = (task.out / ".ray" / "e0.log").read_text()
    assert [line.split(f"process {os.getpid()} ")[1] for line in text.splitlines()] == [
        "waits for the lock",
        "has the lock",
        "e0.training begins at step 0 of 2",
        "e0.training ended at step 2 of 2",
        "e0.gating begins at step 0 of 2",
        "e0.gating ended at step 2 of 2",
        "gives the lock back",
    ]
