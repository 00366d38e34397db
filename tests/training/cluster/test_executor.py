"""Many experts on the machines of a Ray cluster: as on one machine, also if a machine is lost.

The nodes are real ones of Ray, two on this machine.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import phatgoose
from helpers.checks import fails, files_of
from helpers.cli import run, succeed
from helpers.data import make_data
from helpers.models import llama, make_base, make_tokenizer
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, GateConfig, RayConfig
from phatgoose.errors import AdapterError, ClusterError, ConfigError
from phatgoose.models.base import load_base
from phatgoose.training.cluster.executor import train_on_ray
from phatgoose.training.group.jobs import read_jobs
from phatgoose.training.group.train import train_adapters, train_gates

pytestmark = pytest.mark.slow

LORA = AdapterTrainingConfig(steps=6, batch_size=4, rank=3, save_steps=2)
LONG = replace(LORA, steps=150, batch_size=2, save_steps=10)
GATE = GateConfig(steps=4, batch_size=4)
PAIRS = BatchingConfig(experts_at_once=2)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node with one CPU core, to which nodes can be added; without Ray, its tests are skipped, but not in CI."""
    if find_spec("ray") is None:
        reason = "Ray is not installed: pip install 'phatgoose[ray]'"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with pytest.MonkeyPatch.context() as patch:
        # workers run in folders of their own, where a relative path means nothing
        patch.setenv("PYTHONPATH", str(Path(phatgoose.__file__).resolve().parents[1]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")  # who can reach a cluster can run anything there
        patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex + uuid.uuid4().hex)
        import ray
        from ray.cluster_utils import Cluster

        # a dead node is noticed in seconds, and idle workers live for the next test
        options = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500}
        options |= {"health_check_failure_threshold": 3, "idle_worker_killing_time_threshold_ms": 600_000}
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, _system_config=options)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def connected(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster, to which this process is connected, so that workers live from test to test; and a base."""
    import ray

    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False)
    monkeypatch.chdir(tmp_path)
    make_base(llama, Path("tiny-llama"))
    return cluster


@pytest.fixture
def two_nodes(connected: Any) -> Any:
    """The cluster with a second node."""
    if not connected.worker_nodes:
        connected.add_node(num_cpus=1, object_store_memory=80 << 20)
    return connected


def make_files(number: int) -> list[Path]:
    """Data of experts e0, e1, ... of unlike sizes, as relative paths."""
    return [make_data(Path(f"e{i}.jsonl"), rows=12 + 5 * i, seed=i) for i in range(number)]


def train_here(files: list[Path], out: Path, lora: AdapterTrainingConfig = LORA, gates: bool = True) -> None:
    jobs = read_jobs(files, out, "train", "validation")
    model = load_base("tiny-llama")
    train_adapters(model, make_tokenizer(), jobs, config=lora, batching=PAIRS, progress=False)
    if gates:
        train_gates(model, make_tokenizer(), jobs, config=GATE, batching=PAIRS, progress=False)


def on_ray(files: list[Path], out: Path, lora: AdapterTrainingConfig = LORA, **options: Any) -> list[Path]:
    return train_on_ray(
        files,
        out,
        "tiny-llama",
        config=lora,
        gate_config=GATE,
        batching=PAIRS,
        validation_split="validation",
        **options,
    )


def experts_of(out: Path) -> dict[str, Any]:
    """Every file but those of Ray, with its checksum; a config as its values, because PEFT writes sets in any order."""
    found: dict[str, Any] = {name: digest for name, digest in files_of(out).items() if not name.startswith(".ray/")}
    for name in found:
        if name.endswith("adapter_config.json"):
            config = json.loads((out / name).read_text())
            found[name] = config | {"target_modules": sorted(config["target_modules"])}
    return found


def workers_of(log: Path) -> list[int]:
    """Processes that began a group, in turn."""
    return [int(pid) for pid in re.findall(r"process (\d+) has the lock", log.read_text())]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for(what: Callable[[], Any], future: Future[Any]) -> None:
    deadline = time.monotonic() + 240
    while not what():
        assert not future.done(), f"the run ended before it could be killed: {future.exception()}"
        assert time.monotonic() < deadline
        time.sleep(0.002)


def raylet(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


def test_two_nodes_train_as_one_process(two_nodes: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files, out = make_files(4), Path("out")
    assert on_ray(files, out) == [out / f"e{i}" for i in range(4)]
    assert len(re.findall(r"\d of 2: e\d, e\d: finished on", capsys.readouterr().err)) == 2
    logs = sorted(out.glob(".ray/*.log"))
    raylets = {parent(pid) for log in logs for pid in workers_of(log)}
    assert raylets == {raylet(two_nodes.head_node), raylet(*two_nodes.worker_nodes)}
    assert len(logs) == 2
    train_here(files, Path("here"))
    assert experts_of(out) == experts_of(Path("here"))
    assert len(list(out.glob(".ray/*"))) == 4  # a log and a lock for each group
    before = files_of(out)
    on_ray(files, out)
    assert files_of(out) == before


def test_user_errors(two_nodes: Any) -> None:
    """They come back as they are, are not tried again, and harm no other group."""
    files, out = make_files(3), Path("out")
    spoiled = out / "e1.training"
    spoiled.mkdir(parents=True)
    (spoiled / "run.json").write_text('{"experts": {"e1": {}}}')
    fails(ConfigError, "other settings", str(spoiled.absolute()), action=lambda: on_ray(files, out))
    assert len(workers_of(out / ".ray" / "e1.log")) == 1
    assert {path.name for path in out.iterdir()} == {".ray", "e0", "e1.training", "e2"}

    diverging = replace(LORA, learning_rate=1e30, clip=1e30)
    error = fails(AdapterError, "--learning-rate", action=lambda: on_ray(files, Path("wild"), diverging))
    assert str(error).count("is not finite") == 2  # groups
    assert all(f"wild/e{i}" in str(error) for i in range(3))
    assert [path.name for path in Path("wild").iterdir()] == [".ray"]

    (out / ".ray" / "e1.log").unlink()
    (out / ".ray" / "e1.log").mkdir()  # the disk refuses
    with pytest.raises(IsADirectoryError, match=r"e1\.log"):
        on_ray(files, out)
    fails(ClusterError, "1 GPUs", "0 GPUs", action=lambda: on_ray(files, out, cluster=RayConfig(num_gpus=1)))


def test_a_node_is_killed(two_nodes: Any) -> None:
    """Its group resumes elsewhere, from its last checkpoint, and ends at the same weights."""
    files, out = make_files(4), Path("out")
    (node,) = two_nodes.worker_nodes

    def checkpointed_there() -> list[Path]:
        logs = [log for log in out.glob(".ray/*.log") if any(parent(pid) == raylet(node) for pid in workers_of(log))]
        return [log for log in logs if (out / f"{log.stem}.training" / "checkpoint.safetensors").is_file()]

    with ThreadPoolExecutor() as pool:
        future = pool.submit(on_ray, files, out, LONG)
        wait_for(checkpointed_there, future)
        (log,) = checkpointed_there()
        (worker,) = workers_of(log)
        two_nodes.remove_node(node, allow_graceful=False)
        if Path(f"/proc/{worker}").exists():
            os.kill(worker, signal.SIGKILL)
        future.result(timeout=240)
    lines = [line for line in log.read_text().splitlines() if ".training" in line]
    again = workers_of(log)[1]
    begun, resumed, ended = lines
    assert begun.endswith(f" process {worker} {log.stem}.training begins at step 0 of 150")
    step = re.search(rf" process {again} {log.stem}.training resumes at step (\d+) of 150$", resumed)
    assert step is not None, lines
    assert 10 <= int(step[1]) < 150
    assert ended.endswith(f" process {again} {log.stem}.training ended at step 150 of 150")
    train_here(files, Path("here"), LONG)
    assert experts_of(out) == experts_of(Path("here"))


def test_a_group_that_is_lost_too_often(connected: Any) -> None:
    """The others are finished."""
    files, out = make_files(3), Path("out")
    with ThreadPoolExecutor() as pool:
        future = pool.submit(on_ray, files, out, LONG, gates=False, cluster=RayConfig(max_retries=0))
        log = out / ".ray" / "e0.log"
        wait_for(lambda: log.exists() and workers_of(log), future)
        os.kill(workers_of(log)[0], signal.SIGKILL)
        fails(
            ClusterError,
            "1 of 2: e0 was lost",
            "0 retries",
            "repeat the command",
            action=partial(future.result, timeout=240),
        )
    assert {path.name for path in out.iterdir() if path.suffix != ".training"} == {".ray", "e1", "e2"}


def test_command(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It connects to a cluster, and leaves it."""
    import ray

    ray.shutdown()
    monkeypatch.chdir(tmp_path)
    make_base(llama, Path("tiny-llama"))
    files = make_files(2)
    command: list[object] = ["train-many", *files, "--base", "tiny-llama", "--steps", 2, "--batch-size", 2, "--rank", 2]
    command += ["--gate-steps", 2]
    expected = "expert: out/e0\nexpert: out/e1\n"
    assert succeed(*command, "--out", "out", "--executor", "ray", "--ray-address", cluster.address) == expected
    assert not ray.is_initialized()
    succeed(*command, "--out", "here")
    assert experts_of(Path("out")) == experts_of(Path("here"))

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shutil.rmtree("out/e1")
    for options, message in (
        (["--executor", "ray", "--ray-address", f"127.0.0.1:{port}"], "cannot use the Ray cluster at '127.0.0.1:"),
        (["--executor", "ray", "--ray-address", "nonsense"], "cannot use the Ray cluster at 'nonsense'"),
        (["--executor", "ray", "--ray-gpus", 2], "a group trains on one GPU"),
        (["--executor", "ray", "--ray-cpus", 0], "num_cpus must be positive"),
        (["--ray-address", cluster.address], "options of a Ray cluster, but no cluster"),
    ):
        result = run(*command, "--out", "out", *options)
        assert result.code == 2
        assert f"error: {message}" in result.err
    assert not list(Path("out/.ray").glob("driver-*"))


def test_a_machine_without_this_package(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster that is started for the call, because there is no address."""
    import ray

    ray.shutdown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    make_base(llama, Path("tiny-llama"))
    Path("other/phatgoose").mkdir(parents=True)
    Path("other/phatgoose/__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "other"))
    fails(
        ClusterError,
        "lacks a package",
        "No module named 'phatgoose.training'",
        action=lambda: on_ray(make_files(1), Path("out")),
    )
    assert not ray.is_initialized()
