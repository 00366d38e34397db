"""Ray: the connection to a cluster, and the tasks that run there.

Ray is imported here alone, and only when a cluster is used.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from tqdm.auto import tqdm

from phatgoose import __version__
from phatgoose.config import RayConfig
from phatgoose.errors import ClusterError, ConfigError
from phatgoose.training.cluster.task import GroupTask, Outcome, run_group

_CONNECT_S = 10.0


def import_ray() -> Any:
    """The module `ray`.

    Raises:
        ConfigError: it is not installed.
    """
    # Ray reads both on import. Without them it would report usage statistics, and
    # under `uv run` it would copy the working folder to every machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    if find_spec("ray") is None:
        raise ConfigError("several machines need Ray", fix="pip install 'phatgoose[ray]'")
    return import_module("ray")


@contextmanager
def connected(ray: Any, address: str | None) -> Iterator[None]:
    """Stay connected to a cluster in the `with` block; an existing connection is used and kept.

    Args:
        ray: the module.
        address: address of a running cluster; None for $RAY_ADDRESS, or else a
            cluster of this machine alone, which ends with the block.

    Raises:
        ClusterError: the cluster cannot be used.
    """
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
    """Fail within seconds where nothing listens; Ray itself would try for minutes."""
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


def run_tasks(ray: Any, tasks: Mapping[str, GroupTask], cluster: RayConfig, *, progress: bool) -> list[Exception]:
    """Run all tasks to their end.

    Args:
        ray: the module, connected to a cluster.
        tasks: label -> task.
        cluster: resources that each task takes.
        progress: whether to show a bar, and a line for each task that ends.

    Returns:
        The errors of the tasks that failed.

    Raises:
        ClusterError: no machine has what a task takes.
    """
    options: dict[str, Any] = {**task_resources(ray.nodes(), cluster, next(iter(tasks.values())).device)}
    options |= {"max_retries": cluster.max_retries, "retry_exceptions": False, "scheduling_strategy": "SPREAD"}
    # A process for each task: its GPU memory is free again when it ends
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
    """Resources that a task takes of its machine: num_gpus and num_cpus.

    Args:
        nodes: the cluster's nodes, as `ray.nodes()` lists them.
        cluster: the resources that were asked for.
        device: device of the base model; None for a GPU if the task has one.

    Raises:
        ClusterError: no machine has that much, so Ray would wait for ever.
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
    """Error of a task that ended (None if it succeeded), and its machine."""
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
        # A full disk, or a bug of this package
        cause = error.cause if isinstance(error.cause, Exception) else error
        cause.__cause__ = None if cause is error else error  # its text holds the worker's traceback
        return cause, "another machine"
    except ray.exceptions.RayError as error:
        lost = ClusterError(
            f"group {label} was lost",
            found=f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}",
            expected=f"a worker that survives, after at most {cluster.max_retries} retries",
            fix="repeat the command to resume from the last checkpoint",
        )
        return lost, "a machine that is gone"
