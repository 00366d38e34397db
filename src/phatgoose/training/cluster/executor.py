"""Training many experts on many machines: a Ray task for each group of them.

Ray places the tasks, and begins one again whose worker or machine is lost.
All else goes through the folder of the experts, which all machines share.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from phatgoose import __version__
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, GateConfig, RayConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import ClusterError, ConfigError, PhatgooseError
from phatgoose.experts.expert import Expert
from phatgoose.models.base import empty_base, load_tokenizer
from phatgoose.training.cluster.task import NOTES, GroupTask, Outcome, run_group
from phatgoose.training.group.jobs import TrainingJob, read_jobs
from phatgoose.training.group.plan import group_label, is_interrupted, training_groups
from phatgoose.training.group.train import has_adapter, has_own_gate

_CONNECT_S = 10.0


def train_on_ray(
    files: Sequence[Path],
    out: Path,
    base: str,
    revision: str | None = None,
    *,
    config: AdapterTrainingConfig | None = None,
    gate_config: GateConfig | None = None,
    gates: bool = True,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    split: str = "train",
    validation_split: str | None = None,
    device: str | None = None,
    cluster: RayConfig | None = None,
    progress: bool = True,
) -> list[Path]:
    """Train an adapter and a gate for each data file on a Ray cluster; see `train_adapters` and `train_gates`.

    Groups are those of one machine, and so are results, beyond the rounding
    that machines differ in. Finished experts are left alone. A group whose
    machine is lost goes on from its last checkpoint on another one, and all
    groups do when the call is made again.

    Every machine needs this version of this package, and must see `files`,
    `out` and, if it is a folder, `base` at the same paths. A cluster that this
    process is connected to already is used as it is.

    Args:
        files: .jsonl or .jsonl.gz, one for each expert, which is named after it.
        out: gets a folder for each expert, and .ray with a log for each group.
        base: of `load_base`, which each task calls.
        revision: of the base.
        config: of the adapters. The base's weights are of its dtype.
        gate_config: of the gates.
        gates: whether to train gates.
        text: how examples become tokens.
        batching: how many experts at once.
        save_dtype: of the numbers on disk.
        split: rows to train on.
        validation_split: rows to choose adapters' checkpoints by; None for none.
        device: as in `load_base`; None means a GPU where the task has one.
        cluster: which one, and what a group takes of it.
        progress: whether to show a bar, and a line for each group that ends.

    Returns:
        Each expert's folder, in the order of `files`.

    Raises:
        ConfigError: Ray is not installed, a setting cannot be used, or an
            unfinished run with others lies in `out`.
        ClusterError: the cluster cannot be reached, no machine has what a group
            takes, one does not share `out`, or a group was lost too often.
        PhatgooseError: whatever else training raises. Other groups are finished
            first; if several kinds of errors came back, it is none of its subclasses.
    """
    ray = _import_ray()
    cluster = cluster or RayConfig()
    template = GroupTask(
        files=tuple(file.absolute() for file in files),
        out=out.absolute(),
        cwd=Path.cwd(),
        marker="",
        version=__version__,
        base=base,
        revision=revision,
        device=device,
        split=split,
        validation_split=validation_split,
        config=config or AdapterTrainingConfig(),
        gate_config=(gate_config or GateConfig()) if gates else None,
        text=text or TextConfig(),
        batching=batching or BatchingConfig(),
        save_dtype=save_dtype,
        lock_timeout_s=cluster.lock_timeout_s,
    )
    jobs = read_jobs(template.files, template.out, split, validation_split)
    file_of = {job.name: file for job, file in zip(jobs, template.files, strict=True)}
    groups = pending_groups(jobs, template)
    if groups:
        with _marked(template.out) as marker, _connected(ray, cluster.address):
            tasks = {
                group_label(group, i, len(groups)): replace(
                    template, marker=marker, files=tuple(file_of[job.name] for job in group)
                )
                for i, group in enumerate(groups, start=1)
            }
            _raise(_run(ray, tasks, cluster, progress))
    return [out / job.name for job in jobs]


def _import_ray() -> Any:
    # Ray reads them when it is imported: it reports its use to its makers, and
    # under `uv run` it would copy the working folder to every machine
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if find_spec("ray") is None:
        raise ConfigError("several machines need Ray", fix="pip install 'phatgoose[ray]'")
    return import_module("ray")


def pending_groups(jobs: Sequence[TrainingJob], task: GroupTask) -> list[list[TrainingJob]]:
    """The groups that are still to be trained, as on one machine; interrupted ones come first.

    Args:
        jobs: all of them.
        task: what they have in common.

    Raises:
        ConfigError: an interrupted group has an expert that is not in `jobs`.
        AdapterError: something else lies in a job's folder.
        BaseModelError: there is no such base.
    """
    encoder = Encoder(load_tokenizer(task.base, task.revision), empty_base(task.base, task.revision).config, task.text)
    adapters = [has_adapter(job) for job in jobs]
    groups = training_groups(jobs, adapters, encoder, task.batching, task.config.batch_size, ".training")
    if task.gate_config is not None:  # the others' gates are trained where their adapters are
        taken = {job.name for group in groups for job in group}
        rest = [job for job in jobs if job.name not in taken]
        finished = [has_own_gate(Expert(job.folder)) for job in rest]
        groups += training_groups(rest, finished, encoder, task.batching, task.gate_config.batch_size, ".gating")
    groups.sort(key=lambda group: not (is_interrupted(group, ".training") or is_interrupted(group, ".gating")))
    return groups


@contextmanager
def _marked(out: Path) -> Iterator[str]:
    """Name of a new file in `out`/NOTES, by which a machine can tell that it sees the same folder."""
    notes = out / NOTES
    notes.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(prefix="driver-", dir=notes) as file:
        yield Path(file.name).name


@contextmanager
def _connected(ray: Any, address: str | None) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check_listens(address)
    options = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level="error", **options)
    except (ConnectionError, TimeoutError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise _cannot_use(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in address and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
        except (OSError, OverflowError) as error:
            raise _cannot_use(address, error) from error


def _cannot_use(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        f"cannot use the Ray cluster at {address!r}",
        found=(str(error).splitlines() or [type(error).__name__])[0],
        expected="what `ray start --head` printed; the same Ray, Python and RAY_AUTH_MODE on all machines",
        fix="ray start --address ADDRESS on this machine, which must be one of the cluster's",
    )


def _run(ray: Any, tasks: dict[str, GroupTask], cluster: RayConfig, progress: bool) -> list[Exception]:
    """Run all tasks; returns what went wrong."""
    options: dict[str, Any] = {**task_resources(ray.nodes(), cluster, next(iter(tasks.values())).device)}
    options |= {"max_retries": cluster.max_retries, "retry_exceptions": False, "scheduling_strategy": "SPREAD"}
    # a process that ends gives its GPU's memory back
    remote = ray.remote(max_calls=1 if options["num_gpus"] else 0)(run_group).options(**options)
    labels = {remote.remote(task): label for label, task in tasks.items()}
    failures: list[Exception] = []
    with tqdm(total=len(labels), unit="group", disable=not progress) as bar:
        while labels:
            (done,), _ = ray.wait(list(labels), num_returns=1)
            label = labels.pop(done)
            failure, host = _outcome(ray, done, label, cluster)
            if failure is not None:
                failures.append(failure)
            if progress:
                bar.write(f"{label}: {'failed' if failure else 'finished'} on {host}", file=sys.stderr)
            bar.update()
    return failures


def task_resources(nodes: Sequence[Mapping[str, Any]], cluster: RayConfig, device: str | None) -> dict[str, float]:
    """What a task takes of a machine: num_gpus and num_cpus.

    Args:
        nodes: of the cluster, as Ray lists them.
        cluster: what is wanted.
        device: of `load_base`.

    Raises:
        ClusterError: no machine has as much, and Ray would wait for one.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    wants_gpu = any(machine.get("GPU", 0) >= 1 for machine in machines) and not (device or "").startswith("cpu")
    num_gpus = float(wants_gpu) if cluster.num_gpus is None else cluster.num_gpus
    if not any(m.get("GPU", 0) >= num_gpus and m.get("CPU", 0) >= cluster.num_cpus for m in machines):
        raise ClusterError(
            f"no machine of the cluster has {num_gpus:g} GPUs and {cluster.num_cpus:g} CPUs for a group",
            found=", ".join(f"{m.get('GPU', 0):g} GPUs and {m.get('CPU', 0):g} CPUs" for m in machines),
            fix="ask for less, or start the machines first",
        )
    return {"num_gpus": num_gpus, "num_cpus": cluster.num_cpus}


def _outcome(ray: Any, done: Any, label: str, cluster: RayConfig) -> tuple[Exception | None, str]:
    """What went wrong in a task that ended, and on which machine."""
    try:
        outcome: Outcome = ray.get(done)
        return outcome.error, outcome.host
    except ray.exceptions.RayTaskError as error:
        missing = getattr(error.cause, "client_exc", error.cause)
        if isinstance(missing, ImportError):
            lacking = ClusterError(
                "a machine of the cluster lacks a package",
                found=str(missing),
                expected=f"phatgoose {__version__}, with what it needs, on all machines",
                fix="pip install 'phatgoose[ray]' where `ray start` was given, and start Ray there again",
            )
            return lacking, "another machine"
        # a full disk, or a bug of ours
        cause = error.cause if isinstance(error.cause, Exception) else error
        cause.__cause__ = None if cause is error else error  # whose text has the worker's traceback
        return cause, "another machine"
    except ray.exceptions.RayError as error:
        lost = ClusterError(
            f"group {label} was lost",
            found=f"{type(error).__name__}: {(str(error).splitlines() or ['no word of it'])[0]}",
            expected=f"a worker that lives, after {cluster.max_retries} retries at the latest",
            fix="give the command again to go on from the last checkpoint",
        )
        return lost, "a machine that is gone"


def _raise(failures: Sequence[Exception]) -> None:
    """Raise what went wrong in the groups, if anything did, as one error."""
    of_users = [failure for failure in failures if isinstance(failure, PhatgooseError)]
    for failure in failures:
        if not isinstance(failure, PhatgooseError):
            raise failure
    texts = list(dict.fromkeys(map(str, of_users)))
    if len(texts) == 1:
        raise of_users[0]
    if texts:
        kinds = {type(failure) for failure in of_users}
        kind = kinds.pop() if len(kinds) == 1 else PhatgooseError
        raise kind("\n".join(texts))
