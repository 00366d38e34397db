"""Many experts on the machines of a Ray cluster: as on one machine, also if a machine is lost.

Every test drives real Ray nodes, two on this machine.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
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
from cli_workshop import run, succeed
from conftest import fails, files_of, llama, make_base, make_data, make_tokenizer

from phatgoose.base import load_base
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, GateConfig
from phatgoose.errors import ClusterError, ConfigError
from phatgoose.many import train_adapters, train_gates
from phatgoose.ray_config import RayConfig
from phatgoose.ray_executor import train_on_ray
from phatgoose.training_groups import read_jobs

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
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")  # who can reach a cluster can run anything there
        patch.setenv("RAY_AUTH_TOKEN", uuid.uuid4().hex + uuid.uuid4().hex)
        import ray
        from ray.cluster_utils import Cluster

        quick = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
        cluster = Cluster()
        try:
            cluster.add_node(num_cpus=1, object_store_memory=80 << 20, include_dashboard=False, _system_config=quick)
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


@pytest.fixture
def two_nodes(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster with a second node; this process is connected to it, so that workers live from test to test."""
    import ray

    if not cluster.worker_nodes:
        cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False)
    monkeypatch.chdir(tmp_path)
    make_base(llama, Path("tiny-llama"))
    return cluster


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


def experts_of(out: Path) -> dict[str, str]:
    return {name: digest for name, digest in files_of(out).items() if not name.startswith(".ray/")}


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
    assert experts_of(out) == files_of(Path("here"))
    assert len(list(out.glob(".ray/*"))) == 4  # a log and a lock for each group
    before = files_of(out)
    on_ray(files, out)
    assert files_of(out) == before


def test_a_node_is_killed(two_nodes: Any) -> None:
    """Its group goes on elsewhere, from its last checkpoint, and ends at the same weights."""
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
    assert [re.sub(r"^.* process ", "", line) for line in lines[:1]] == [f"{worker} {log.stem}.training begins at step 0 of 150"]
    resumed = re.fullmatch(rf".* process {again} {log.stem}.training goes on from step (\d+) of 150", lines[1])
    assert resumed is not None, lines
    assert 10 <= int(resumed[1]) < 150
    assert lines[2].endswith(f" process {again} {log.stem}.training ended at step 150 of 150")
    assert len(lines) == 3
    train_here(files, Path("here"), LONG)
    assert experts_of(out) == files_of(Path("here"))


def test_a_group_that_is_lost_too_often(two_nodes: Any) -> None:
    """The other group is finished; the lost one is when the call is made again."""
    files, out = make_files(3), Path("out")
    with ThreadPoolExecutor() as pool:
        future = pool.submit(on_ray, files, out, LONG, gates=False, cluster=RayConfig(max_retries=0))
        log = out / ".ray" / "e1.log"  # of the group of two
        wait_for(lambda: log.exists() and workers_of(log), future)
        os.kill(workers_of(log)[0], signal.SIGKILL)
        fails(ClusterError, "e1, e2", "was lost", "0 retries", "again", action=partial(future.result, timeout=240))
    assert (out / "e0").is_dir() and not (out / "e1").exists()
    on_ray(files, out, LONG, gates=False)
    train_here(files, Path("here"), LONG, gates=False)
    assert experts_of(out) == files_of(Path("here"))


def test_user_errors(two_nodes: Any) -> None:
    """They come back as they are, are not tried again, and harm no other group."""
    files, out = make_files(3), Path("out")
    spoiled = out / "e1.training"
    spoiled.mkdir(parents=True)
    (spoiled / "run.json").write_text('{"experts": {"e1": {}}}')
    fails(ConfigError, "other settings", str(spoiled.absolute()), action=lambda: on_ray(files, out))
    assert len(workers_of(out / ".ray" / "e1.log")) == 1
    shutil.rmtree(spoiled)
    files[1].write_text("{")
    shutil.copytree(out, "before")
    fails(ConfigError, "e3.csv", action=lambda: on_ray([Path("e3.csv")], out))
    fails(ClusterError, "1 GPUs", "0 GPUs", action=lambda: on_ray(make_files(2), out, cluster=RayConfig(num_gpus=1)))
    assert experts_of(out) == files_of(Path("before")) 
