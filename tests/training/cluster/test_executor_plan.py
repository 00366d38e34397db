"""What a run on a Ray cluster would do, without a cluster."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers.checks import fails
from helpers.data import make_data
from helpers.models import llama, make_base
from helpers.pools import make_adapter, make_expert
from helpers.training import make_task
from phatgoose.config import RayConfig
from phatgoose.errors import ClusterError, ConfigError
from phatgoose.training.cluster.executor import pending_groups, train_on_ray
from phatgoose.training.cluster.ray_cluster import task_resources
from phatgoose.training.group.jobs import read_jobs


def test_groups_that_are_still_to_be_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Interrupted ones first, as they were; where only gates are missing, a group of its own."""
    monkeypatch.chdir(tmp_path)
    make_base(llama, tmp_path / "tiny-llama")
    files = tuple(make_data(tmp_path / f"e{i}.jsonl", rows=12, seed=i) for i in range(8))
    out = tmp_path / "out"
    jobs = read_jobs(files, out, "train", None)
    make_expert(llama, out / "e0")
    for i in (1, 2, 6):
        make_adapter(llama, out / f"e{i}", seed=i)
    for lead, suffix, names in (("e2", ".gating", ("e2", "e1")), ("e7", ".training", ("e7", "e6", "e5"))):
        (out / (lead + suffix)).mkdir()
        (out / (lead + suffix) / "run.json").write_text(json.dumps({"experts": {name: {} for name in names}}))
    task = make_task(tmp_path, files)
    groups = [[job.name for job in group] for group in pending_groups(jobs, task)]
    assert groups == [["e7", "e6", "e5"], ["e2", "e1"], ["e3", "e4"]]
    shutil.rmtree(out / "e2.gating")
    groups = [[job.name for job in group] for group in pending_groups(jobs, task)]
    assert groups == [["e7", "e6", "e5"], ["e3", "e4"], ["e1", "e2"]]
    groups = [[job.name for job in group] for group in pending_groups(jobs, replace(task, gate_config=None))]
    assert groups == [["e7", "e6", "e5"], ["e3", "e4"]]


def test_what_a_task_takes() -> None:
    def node(gpus: float, cpus: float = 8, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "Resources": {"CPU": cpus, "memory": 1e9} | ({"GPU": gpus} if gpus else {})}

    found = task_resources([node(0), node(4)], RayConfig(), None)
    assert found == {"num_gpus": 1, "num_cpus": 1}
    assert task_resources([node(0), node(4)], RayConfig(), "cpu") == {"num_gpus": 0, "num_cpus": 1}
    assert task_resources([node(0), node(4, alive=False)], RayConfig(num_cpus=8), None)["num_gpus"] == 0
    assert task_resources([node(4)], RayConfig(num_gpus=0.25), "cuda")["num_gpus"] == 0.25
    fails(ClusterError, "9 CPUs", action=lambda: task_resources([node(0)], RayConfig(num_cpus=9), None))
    # not both on one machine
    nodes = [node(0, cpus=16), node(1, cpus=2)]
    fails(ClusterError, "1 GPUs and 4 CPUs", action=lambda: task_resources(nodes, RayConfig(num_cpus=4), None))


def test_ray_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phatgoose.training.cluster.ray_cluster.find_spec", lambda name: None)
    action = partial(train_on_ray, [tmp_path / "a.jsonl"], tmp_path / "out", "tiny-llama")
    fails(ConfigError, "need Ray", "pip install 'phatgoose[ray]'", action=action)
