"""Every bad input gets one error of ours, names the thing, and leaves the disk as it was."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from helpers.checks import files_of
from helpers.golden import GOLDEN
from helpers.models import llama, t5
from helpers.pools import fill_pool, make_adapter, make_expert, make_gate, make_pool
from phatgoose import errors
from phatgoose.cli import app
from phatgoose.data.examples import read_examples
from phatgoose.errors import PhatgooseError
from phatgoose.experts.expert import Expert
from phatgoose.experts.official import import_official
from phatgoose.experts.pool import Pool
from phatgoose.models.base import load_base
from phatgoose.routing.model import RoutedModel


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    first = min(tensors)
    tensors[first] = change(tensors[first])
    save_file(tensors, path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_a_pickle(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


# What is wrong with an adapter's folder -> how it is made so, error, a word of the message
BROKEN_ADAPTERS: dict[str, tuple[Callable[[Path], object], type[PhatgooseError], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), errors.AdapterError, "adapter_config.json"),
    "broken config": (lambda f: truncate(f / "adapter_config.json"), errors.AdapterError, "JSON"),
    "truncated": (lambda f: truncate(f / "adapter_model.safetensors"), errors.AdapterError, "adapter_model"),
    "pickle": (only_a_pickle, errors.AdapterError, "pickle"),
    "NaN": (
        lambda f: edit_tensors(f / "adapter_model.safetensors", lambda t: t * torch.nan),
        errors.AdapterError,
        "NaN",
    ),
    "rank": (lambda f: edit_config(f, r=5), errors.AdapterError, "rank 5"),
    "DoRA": (lambda f: edit_config(f, use_dora=True), errors.AdapterError, "DoRA"),
    "IA3": (lambda f: edit_config(f, peft_type="IA3"), errors.AdapterError, "IA3"),
    "whole modules": (lambda f: edit_config(f, modules_to_save=["lm_head"]), errors.AdapterError, "modules_to_save"),
    "bias": (lambda f: edit_config(f, bias="all"), errors.AdapterError, "bias"),
    "PiSSA": (lambda f: edit_config(f, init_lora_weights="pissa"), errors.AdapterError, "pissa"),
    "other base": (lambda f: edit_config(f, base_model_name_or_path="org/other"), errors.PoolError, "org/other"),
    "NaN gate": (lambda f: make_gate(f, scale=torch.nan), errors.GateError, "not finite"),
    "truncated gate": (lambda f: truncate(f / "gate.safetensors"), errors.GateError, "gate.safetensors"),
    "gate of another": (
        lambda f: edit_tensors(f / "adapter_model.safetensors", lambda t: t + 1),
        errors.GateError,
        "another adapter",
    ),
    "other shapes": (lambda f: shutil.copytree(f.parent / "t5", f, dirs_exist_ok=True), errors.PoolError, "tiny-t5"),
}


@pytest.mark.parametrize("what", BROKEN_ADAPTERS)
def test_a_broken_adapter_stays_out(what: str, tmp_path: Path) -> None:
    breaks, error, word = BROKEN_ADAPTERS[what]
    pool = make_pool(llama, tmp_path, 2)
    make_expert(t5, tmp_path / "t5")
    make_expert(llama, tmp_path / "new", seed=9)
    breaks(tmp_path / "new")
    before = files_of(tmp_path / "pool")
    with pytest.raises(error) as caught:
        pool.add(tmp_path / "new")
    assert word in str(caught.value)
    assert caught.value.found is not None
    assert caught.value.expected is not None
    assert files_of(tmp_path / "pool") == before
    assert Pool.open(tmp_path / "pool").names == ("e0", "e1")


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "gate.safetensors"])
def test_damage_inside_a_pool(file: str, tmp_path: Path) -> None:
    make_pool(llama, tmp_path, 2)
    truncate(tmp_path / "pool" / "experts" / "e1" / file)
    pool = Pool.open(tmp_path / "pool")
    (problem,) = pool.check()
    assert "'e1'" in str(problem)
    with pytest.raises((errors.AdapterError, errors.GateError), match="e1"):
        RoutedModel.from_pool(llama(), pool)


def test_missing_gate_fails_before_anything_is_loaded(tmp_path: Path) -> None:
    experts = [make_expert(llama, tmp_path / "gated"), make_adapter(llama, tmp_path / "bare", seed=1)]
    pool = fill_pool(tmp_path / "pool", "tiny-llama", experts)
    with pytest.raises(errors.RouterError, match="bare") as caught:
        RoutedModel.from_pool("no such model", pool)  # would fail later, were it looked at
    assert "phatgoose gate" in str(caught.value.fix)


def test_routers_and_top_k(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, 2)
    with pytest.raises(errors.RouterError, match="top_k 3"):
        RoutedModel.from_pool(llama(), pool, top_k=3)
    with pytest.raises(errors.RouterError, match="nonsense"):
        RoutedModel.from_pool(llama(), pool, router="nonsense")
    with pytest.raises(errors.ConfigError, match="top_k"):
        RoutedModel.from_pool(llama(), pool, top_k=0)
    with pytest.raises(errors.ConfigError, match="backend"):
        RoutedModel.from_pool(llama(), pool, backend="quick")


def test_wrong_base(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, 2)
    with pytest.raises(errors.BaseModelError, match="tiny-llama"):
        RoutedModel.from_pool(t5(), pool)
    nameless = t5()
    nameless.config._name_or_path = ""
    with pytest.raises(errors.BaseModelError, match=r"q_proj|k_proj|down_proj"):
        RoutedModel.from_pool(nameless, pool)
    with pytest.raises(errors.BaseModelError, match="nowhere"):
        load_base(str(tmp_path / "nowhere"))


def test_wrong_revision(tmp_path: Path) -> None:
    expert = make_expert(llama, tmp_path / "e", revision="aaaa")
    pool = Pool.create(tmp_path / "pool", "tiny-llama", "bbbb")
    with pytest.raises(errors.PoolError, match="aaaa"):
        pool.add(expert)


def test_unknown_site(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, 1)
    model = llama()
    model.model.layers = model.model.layers[:1]
    with pytest.raises(errors.BaseModelError, match=r"layers\.1"):
        RoutedModel.from_pool(model, pool, top_k=1)


def test_two_experts_of_one_name(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, 1)
    with pytest.raises(errors.PoolError, match="e0") as caught:
        pool.add(tmp_path / "e0")
    assert "--name" in str(caught.value.fix)


def test_pool_folders(tmp_path: Path) -> None:
    with pytest.raises(errors.PoolError, match="not a pool"):
        Pool.open(tmp_path / "none")
    Pool.create(tmp_path / "empty", "tiny-llama")
    with pytest.raises(errors.PoolError, match="is empty"):
        RoutedModel.from_pool(llama(), Pool.open(tmp_path / "empty"))
    with pytest.raises(errors.PoolError, match="cannot create"):
        Pool.create(tmp_path / "empty", "tiny-llama")
    truncate(tmp_path / "empty" / "pool.json")
    with pytest.raises(errors.PoolError, match=r"pool\.json"):
        Pool.open(tmp_path / "empty")


@pytest.mark.parametrize("path", ["../../elsewhere", "experts/..", "/etc", "experts/a/b", "experts"])
def test_a_manifest_cannot_point_outside(path: str, tmp_path: Path) -> None:
    make_pool(llama, tmp_path, 1)
    manifest = tmp_path / "pool" / "pool.json"
    raw = json.loads(manifest.read_text())
    raw["experts"][0]["path"] = path
    manifest.write_text(json.dumps(raw))
    with pytest.raises(errors.PoolError, match="outside"):
        Pool.open(tmp_path / "pool")


GOOD = '{"input": "a", "target": "b"}\n'
BROKEN_DATA = {
    "not JSON": (GOOD + '{"input": "a", \n', "line 2"),
    "no target": (GOOD + GOOD + '{"input": "a"}\n', "line 3"),
    "a number": ('{"input": 3, "target": "b"}\n', "line 1"),
    "a list": ("[1]\n", "line 1"),
    "odd choices": ('{"input": "a", "target": "b", "choices": "b"}\n', "choices"),
    "nothing": ("\n", "no examples"),
}


@pytest.mark.parametrize("what", BROKEN_DATA)
def test_broken_data(what: str, tmp_path: Path) -> None:
    text, word = BROKEN_DATA[what]
    (tmp_path / "data.jsonl").write_text(text)
    with pytest.raises(errors.DataError, match=word):
        read_examples(str(tmp_path / "data.jsonl"))


def test_data_files(tmp_path: Path) -> None:
    with pytest.raises(errors.DataError, match="none"):
        read_examples(str(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD.encode() * 1000)[:40])
    with pytest.raises(errors.DataError, match="cut"):
        read_examples(str(tmp_path / "cut.jsonl.gz"))


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.mark.parametrize("what", ["pickle", "truncated", "other tensors"])
def test_official_checkpoints(what: str, tmp_path: Path) -> None:
    path, trap = tmp_path / "bad.pt", tmp_path / "trap"
    if what == "pickle":
        torch.save({"x": Trap(trap)}, path)
    elif what == "truncated":
        shutil.copy(GOLDEN / "official_checkpoint.pt", path)
        truncate(path)
    else:
        torch.save({"encoder.weight": torch.zeros(2)}, path)
    with pytest.raises(errors.CheckpointError, match=r"bad\.pt"):
        import_official(path, t5(), "tiny-t5", tmp_path / "pool")
    assert not trap.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["bad.pt"]


def test_the_command_line_exits_with_2(tmp_path: Path) -> None:
    import subprocess
    import sys

    call = [sys.executable, "-c", "from phatgoose.cli import main; main()"]
    found = subprocess.run([*call, "pool", "list", str(tmp_path / "no")], capture_output=True, text=True)
    assert found.returncode == 2
    assert "is not a pool" in found.stderr
    assert "Traceback" not in found.stderr
    assert CliRunner().invoke(app, ["pool", "list", str(tmp_path), "--wrong"]).exit_code == 2
    assert CliRunner().invoke(app, ["gate", str(tmp_path), "--data", "x", "--steps", "many"]).exit_code == 2


def test_names_of_experts(tmp_path: Path) -> None:
    make_adapter(llama, tmp_path / "e")
    for name in ("", "a/b", "..", "-x", "a b"):
        with pytest.raises(errors.ConfigError, match="named"):
            Expert(tmp_path / "e", name)
