"""A task of one machine of a cluster: train the adapters of a group of experts, then their gates.

Nothing here depends on Ray.
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
from phatgoose.training.run import ADAPTER_WORK, GATE_WORK

NOTES = ".ray"  # folder beside the experts' folders, with a lock and a log for each group


@dataclass(frozen=True, kw_only=True)
class GroupTask:
    """A group of experts to train, as it is sent to a machine: names and paths, neither data nor weights.

    The driver is the process that sends it.

    Attributes:
        files: a data file for each expert, absolute paths; the first one leads the group.
        out: folder in which each expert gets its folder, absolute path.
        cwd: the driver's working folder, for a base model given as a relative path.
        marker: name of a file in `out`/NOTES that the driver has created.
        version: the driver's version of this package.
        base: name of the base model (`load_base`); its weights have the dtype of `config`.
        revision: revision of the base model's hub repository.
        device: device of the base model; None for a GPU if the task has one.
        split: split of the rows to train on.
        validation_split: split of the rows to choose checkpoints by; None for none.
        config: settings of the adapters.
        gate_config: settings of the gates; None to train no gates.
        text: how examples become tokens.
        batching: how many experts train at once.
        save_dtype: dtype of the saved tensors.
        lock_timeout_s: seconds to wait for a lock whose holder makes no progress (`group_lock`).
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
        error: error for the user; None if all experts are finished.
    """

    host: str
    error: PhatgooseError | None


def run_group(task: GroupTask) -> Outcome:
    """Train a group, or resume it from its last checkpoint if it was begun elsewhere.

    An error for the user is returned rather than raised: Ray would wrap a raised one
    in another class with another text.
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
    checkpoints = [job.work(suffix) / CHECKPOINT_FILE for job in jobs for suffix in (ADAPTER_WORK, GATE_WORK)]
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
    """Append this package's log to a file, which all processes that train one group share."""
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
