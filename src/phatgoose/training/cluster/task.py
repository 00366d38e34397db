"""What a machine of a cluster does: it trains the adapters of a group of experts, and then their gates.

Nothing in here knows Ray.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from phatgoose import __version__
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, GateConfig, TextConfig
from phatgoose.errors import ClusterError, PhatgooseError
from phatgoose.models.base import load_base, load_tokenizer
from phatgoose.training.cluster.lock import group_lock
from phatgoose.training.group.jobs import TrainingJob, read_jobs
from phatgoose.training.group.train import train_adapters, train_gates
from phatgoose.training.group.trainer import CHECKPOINT_FILE

NOTES = ".ray"  # in the folder of the experts: a lock and a log for each group


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """A group of experts to train, as it travels: names and paths, neither data nor weights.

    Attributes:
        files: a data file for each expert, absolute; the first one leads the group.
        out: gets a folder for each expert, absolute.
        cwd: the driver's, for a base that is a relative path.
        marker: a file in `out`/NOTES that the driver made.
        version: the driver's version of this package.
        base: of `load_base`; so are revision and device. Its weights are of the adapters' dtype.
        revision: of the base.
        device: None means a GPU if the task has one.
        split: rows to train on.
        validation_split: rows to choose checkpoints by; None for none.
        config: of the adapters.
        gate_config: of the gates; None for none.
        text: how examples become tokens.
        batching: how experts are trained over one forward pass.
        save_dtype: of the numbers on disk.
        lock_timeout_s: see `group_lock`.
    """

    files: tuple[Path, ...]
    out: Path
    cwd: Path
    marker: str
    version: str
    base: str
    revision: str | None
    device: str | None
    split: str
    validation_split: str | None
    config: AdapterTrainingConfig
    gate_config: GateConfig | None
    text: TextConfig
    batching: BatchingConfig
    save_dtype: Dtype
    lock_timeout_s: float


class Outcome(NamedTuple):
    """How a task ended.

    Attributes:
        host: name of the machine that it ended on.
        error: of the user; None if all experts are finished.
    """

    host: str
    error: PhatgooseError | None


def run_group(task: GroupTask) -> Outcome:
    """Train a group; go on from its last checkpoint if it was begun elsewhere.

    A user's error is returned, not raised: raised, it would come back as
    another class with another text.
    """
    host = socket.gethostname()
    try:
        _check_machine(task, host)
        with contextlib.chdir(task.cwd) if task.cwd.is_dir() else contextlib.nullcontext():
            _train(task, host)
    except PhatgooseError as error:
        return Outcome(host, error)
    return Outcome(host, None)


def _check_machine(task: GroupTask, host: str) -> None:
    if task.version != __version__:
        raise ClusterError(
            f"{host} has another version of phatgoose",
            found=__version__,
            expected=f"{task.version}, as where the command was given",
            fix=f"pip install phatgoose=={task.version} on all machines",
        )
    if not (task.out / NOTES / task.marker).is_file():
        raise ClusterError(
            f"{host} does not see the folder {task.out} of the machine where the command was given",
            found="another folder of this name" if task.out.is_dir() else "no such folder",
            expected="a folder on a file system that all machines share, at the same path on each",
            fix="--out in a shared folder",
        )


def _train(task: GroupTask, host: str) -> None:
    jobs = read_jobs(task.files, task.out, task.split, task.validation_split)
    notes = task.out / NOTES
    log = notes / f"{jobs[0].name}.log"
    checkpoints = [job.work(suffix) / CHECKPOINT_FILE for job in jobs for suffix in (".training", ".gating")]
    with _logging_to(log, host) as logger:
        logger.info("waits for the lock")
        with group_lock(notes / f"{jobs[0].name}.lock", checkpoints, task.lock_timeout_s, log):
            logger.info("has the lock")
            try:
                _train_all(task, jobs)
            finally:
                logger.info("gives the lock back")


def _train_all(task: GroupTask, jobs: list[TrainingJob]) -> None:
    model = load_base(task.base, task.revision, dtype=task.config.dtype, device=task.device)
    tokenizer = load_tokenizer(task.base, task.revision)
    train_adapters(
        model,
        tokenizer,
        jobs,
        config=task.config,
        text=task.text,
        batching=task.batching,
        save_dtype=task.save_dtype,
        progress=False,
    )
    if task.gate_config is not None:
        train_gates(
            model,
            tokenizer,
            jobs,
            config=task.gate_config,
            text=task.text,
            batching=task.batching,
            save_dtype=task.save_dtype,
            progress=False,
        )


@contextlib.contextmanager
def _logging_to(path: Path, host: str) -> Iterator[logging.Logger]:
    """Append what this package logs to a file; the processes that try one group, one after another, share it."""
    logger = logging.getLogger("phatgoose")
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {host} process {os.getpid()} %(message)s"))
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
