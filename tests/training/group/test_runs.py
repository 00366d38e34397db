"""Runs of many experts that are killed, diverge or are given again, and their command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checks import fails, files_of
from helpers.cli import run, succeed
from helpers.data import make_data
from helpers.models import llama, make_base, make_tokenizer
from helpers.pools import make_adapter, make_expert
from helpers.training import GATE, LORA, make_jobs, start, train_many_long
from phatgoose.errors import AdapterError, BaseModelError, ConfigError, GateError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.training.group.model import BatchedLora
from phatgoose.training.group.train import train_adapters, train_gates
from phatgoose.training.group.trainer import enough_memory


@pytest.mark.parametrize("has_run_file", [True, False])
@pytest.mark.parametrize("what", ["adapter", "gate"])
def test_a_run_killed_while_it_cleans_up(what: str, has_run_file: bool, tmp_path: Path) -> None:
    """All experts are there, and the work folder is whole or half deleted: it goes, nothing is trained again."""
    jobs = make_jobs(tmp_path)
    for job in jobs:
        make_expert(llama, job.folder)
    before = files_of(tmp_path)
    work = jobs[0].work(".training" if what == "adapter" else ".gating")
    work.mkdir()
    (work / "checkpoint.safetensors").write_bytes(b"of the last step but ten")
    if has_run_file:
        (work / "run.json").write_text(json.dumps({"experts": {job.name: {} for job in jobs}}), encoding="utf-8")
    train = train_adapters if what == "adapter" else train_gates
    train(llama(), make_tokenizer(), jobs, progress=False)
    assert files_of(tmp_path) == before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "gate"])
def test_a_killed_run_ends_at_the_same_weights(what: str, tmp_path: Path) -> None:
    """It resumes with its group as it was, whatever the size of groups is now."""
    if what == "gate":
        for folder in ("whole", "killed"):
            for i in range(3):
                make_adapter(llama, tmp_path / folder / f"e{i}", seed=i)
    child = start("train_many_long", what, tmp_path / "killed")
    deadline = time.monotonic() + 240
    # of three experts with two at once, the second group has two: kill it there
    while len(list((tmp_path / "killed").glob("*ing/checkpoint.safetensors"))) == 0 or not is_done(what, tmp_path):
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert len(list((tmp_path / "killed").glob("*ing"))) == 1
    finished = next(path for path in (tmp_path / "killed").iterdir() if path.name == "e1")
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    train_many_long(what, tmp_path / "killed", experts_at_once=3)
    assert {path: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    train_many_long(what, tmp_path / "whole")
    file = "adapter_model.safetensors" if what == "adapter" else "gate.safetensors"
    for i in range(3):
        found, expected = (load_file(tmp_path / folder / f"e{i}" / file) for folder in ("killed", "whole"))
        assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["e0", "e1", "e2"]


def is_done(what: str, folder: Path) -> bool:
    """Whether the first group, which is one expert, is finished."""
    expert = folder / "killed" / "e1"
    return expert.is_dir() if what == "adapter" else (expert / "gate.safetensors").is_file()


def test_finished_experts_are_left_alone(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    train = partial(train_adapters, llama(), make_tokenizer(), config=LORA, progress=False)
    train(jobs[:2])
    before = files_of(tmp_path)
    train(jobs)
    assert {name: digest for name, digest in files_of(tmp_path).items() if name in before} == before
    gate = partial(train_gates, llama(), make_tokenizer(), config=GATE, progress=False)
    gate(jobs[:1])
    before = files_of(jobs[0].folder)
    make_adapter(llama, tmp_path / "other", seed=3)
    shutil.copy(tmp_path / "e0" / "gate.safetensors", tmp_path / "e1" / "gate.safetensors")  # of another adapter
    gate(jobs)
    assert files_of(jobs[0].folder) == before
    assert all(Expert(job.folder).load_gate() for job in jobs)


def test_runs_that_diverge(tmp_path: Path) -> None:
    """The checkpoints go, so that another rate can be tried; those that did not diverge are finished."""
    jobs, model = [replace(job, validation=()) for job in make_jobs(tmp_path)], llama()
    config = replace(LORA, learning_rate=1e30, clip=1e30)
    adapters = partial(train_adapters, model, make_tokenizer(), jobs, config=config, progress=False)
    fails(AdapterError, "e0", "e1", "e2", "--learning-rate", action=adapters)
    assert list(tmp_path.iterdir()) == []

    for job in jobs:
        make_adapter(llama, job.folder)
    file = tmp_path / "e1" / "adapter_model.safetensors"
    save_file({name: 1e30 * t for name, t in load_file(file).items()}, file)  # its products overflow
    gates = partial(train_gates, model, make_tokenizer(), jobs, config=GATE, progress=False)
    assert "/e0" not in str(fails(GateError, "/e1", "not finite", action=gates))
    assert [Expert(job.folder).has_gate for job in jobs] == [True, False, True]
    assert {path.name for path in tmp_path.iterdir()} == {"e0", "e1", "e2"}


def test_unfinished_runs_of_others(tmp_path: Path) -> None:
    jobs = make_jobs(tmp_path)
    train = partial(train_adapters, llama(), make_tokenizer(), config=LORA, progress=False)
    work = tmp_path / "e1.training"
    work.mkdir()
    (work / "run.json").write_text('{"experts": {"e1": {}, "elsewhere": {}}}')
    fails(ConfigError, "elsewhere", str(work), action=lambda: train(jobs))
    (work / "run.json").write_text('{"experts": {"e1": {}}}')
    fails(ConfigError, "other settings", action=lambda: train(jobs))
    (work / "run.json").write_text('{"steps": 6}')
    fails(ConfigError, "e1 alone", action=lambda: train(jobs))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e1.training"]
    fails(ConfigError, "two experts are named 'e0'", action=lambda: train([jobs[0], jobs[0]]))


def test_a_damaged_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = make_jobs(tmp_path)
    train = partial(train_adapters, llama(), make_tokenizer(), jobs, config=LORA, progress=False)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("phatgoose.training.group.adapters.save_lora", full_disk)
        train()
    (checkpoint,) = tmp_path.glob("*.training/checkpoint.safetensors")
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(whole[:1000])
    fails(ConfigError, str(checkpoint), "delete", action=train)
    checkpoint.write_bytes(whole)
    train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e0", "e1", "e2"]


def test_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them, each would train every expert."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    train = partial(train_adapters, llama(), make_tokenizer(), make_jobs(tmp_path), progress=False)
    fails(ConfigError, "one process", "2 processes", "CUDA_VISIBLE_DEVICES", action=train)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory() -> None:
    """A GPU's error, which no CPU makes."""

    def allocate() -> None:
        with enough_memory(12):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    fails(ConfigError, "12 experts at once", "Tried to allocate 3 GiB", "--experts-at-once", action=allocate)


def test_a_layer_that_does_not_see_sequences() -> None:
    layer = BatchedLora(torch.nn.Linear(4, 4), torch.zeros(2, 1, 4), torch.zeros(2, 1, 4))
    fails(BaseModelError, "(6, 4)", "phatgoose train", action=lambda: layer(torch.zeros(6, 4)))


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_base(llama, tmp_path / "tiny-llama")
    for i, name in enumerate(("a.jsonl", "b.jsonl.gz")):
        make_data(tmp_path / name, rows=10, seed=i)
    command: list[object] = ["train-many", "a.jsonl", "b.jsonl.gz", "--base", "tiny-llama", "--out", "experts"]
    quick = ["--steps", 4, "--save-steps", 2, "--batch-size", 2, "--rank", 2, "--gate-steps", 2]
    assert succeed(*command, *quick, "--no-gates", "--validation-split", "validation") == (
        "expert: experts/a\nexpert: experts/b\n"
    )
    assert not Expert("experts/a").has_gate
    succeed(*command, *quick)
    pool = Pool.create("pool", "tiny-llama")
    for name in ("a", "b"):
        pool.add(Path("experts") / name)
    assert pool.check() == []
    assert all(expert.has_gate for expert in pool.experts())
    before = files_of(Path("experts"))
    succeed(*command, *quick)
    assert files_of(Path("experts")) == before
    for extra, message in (
        (["lost.jsonl"], "no data file lost.jsonl"),
        (["a.csv"], "a.csv is not a data file"),
        (["a.jsonl"], "two experts are named 'a'"),
        (["--experts-at-once", 0], "experts_at_once must be at least 1"),
        (["--gate-steps", 0], "steps must be at least 1"),
    ):
        result = run(*command, *extra)
        assert result.code == 2
        assert f"error: {message}" in result.err
