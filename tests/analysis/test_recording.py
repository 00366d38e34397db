"""phatgoose record and its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors import safe_open

from helpers.checks import fails, files_of
from helpers.cli import run, succeed
from helpers.grids import choosing, make_grid, recording, write_rows
from phatgoose.analysis import recorder
from phatgoose.analysis.recording import read_recording
from phatgoose.errors import ResultsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("grid"))


@pytest.fixture(autouse=True)
def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


def test_what_is_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert f"phatgoose analyse {out}" in succeed(*recording(out, seed=3))
    header = json.loads((out / "recording.json").read_text())
    assert header["method"] == "phatgoose"
    assert (header["experts"], len(header["sites"]), header["seed"]) == (["e0", "e1", "e2"], 14, 3)
    assert header["router"]["top_k"] == 2
    assert set(header["versions"]) == {"phatgoose", "torch", "transformers", "peft", "lm_eval"}
    with safe_open(out / "leave-one-out.safetensors", framework="numpy") as file:
        tasks = json.loads(file.metadata()["recording"])["tasks"]
        weights_TME = file.get_tensor("weights_TME")
    assert [task["task"] for task in tasks] == ["e0", "e1"]
    assert [task["masked"] for task in tasks] == [["e0"], ["e1"]]
    assert weights_TME.shape == (2, 14, 3)
    assert weights_TME.dtype == np.float16
    assert weights_TME[0, :, 0].max() == weights_TME[1, :, 1].max() == 0
    np.testing.assert_allclose(weights_TME.sum(axis=2), 1, atol=2e-3)
    read = read_recording(out)
    assert list(read.tasks) == [("t0ho", "rte"), ("t0ho", "cb"), ("leave-one-out", "e0"), ("leave-one-out", "e1")]
    assert read.tasks["t0ho", "cb"].num_rows == 6


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    succeed(*recording(whole))
    real, done = recorder.record_task, []

    def dies_on_the_third(model: Any, encoder: Any, task: Any, **options: Any) -> Any:
        if len(done) == 2:
            raise MemoryError
        done.append(task.task_name)
        return real(model, encoder, task, **options)

    monkeypatch.setattr(recorder, "record_task", dies_on_the_third)
    with pytest.raises(MemoryError):
        run(*recording(out))
    assert set(read_recording(out).tasks) == {("t0ho", "rte"), ("t0ho", "cb")}
    (out / ".t0ho.safetensors.half").write_bytes(b"half a file")

    def counts(model: Any, encoder: Any, task: Any, **options: Any) -> Any:
        done.append(task.task_name)
        return real(model, encoder, task, **options)

    monkeypatch.setattr(recorder, "record_task", counts)
    succeed(*recording(out))
    assert done == ["t0ho_rte", "t0ho_cb", "leave-one-out_e0", "leave-one-out_e1"]
    assert files_of(out) == files_of(whole)
    succeed(*recording(out))
    assert len(done) == 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router": "phatgoose top_k=1"}, "another method"),
        ({"seed": 1}, "another seed"),
        ({"limit": 5}, "another limit"),
        ({"separator": " "}, "another text"),
    ],
)
def test_another_recording_is_not_mixed_in(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    succeed(*recording(tmp_path, "t0ho", task="rte"))
    before = files_of(tmp_path)
    result = run(*recording(tmp_path, "t0ho", **changes))
    assert (result.code, words in result.err, "--out OTHER" in result.err) == (2, True, True)
    assert files_of(tmp_path) == before


def test_other_rows(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for seed, name in enumerate(("rte", "cb")):
        write_rows(data / "t0ho" / "rendered" / f"{name}.jsonl.gz", choosing(name, 5, 77 + seed))
    succeed(*recording(tmp_path / "out", "t0ho"))
    result = run(*recording(tmp_path / "out", "t0ho", data=data))
    assert result.code == 2
    assert "t0ho/rte with other rows" in result.err


def test_errors_before_anything_runs(tmp_path: Path) -> None:
    for options, words in (
        ({"router": "base"}, ["'base' routes nothing"]),
        ({"router": "expert:e1"}, ["routes nothing"]),
        ({"router": "nobody"}, ["unknown router", "phatgoose-prior"]),
        ({"limit": 0}, ["limit must be at least 1"]),
        ({"suite": "glue"}, ["unknown suite", "t0ho"]),
        ({"pool": "gateless", "router": "phatgoose top_k=1"}, ["needs a gate"]),
    ):
        result = run(*recording(tmp_path / "out", **{"suite": "t0ho"} | options))
        assert result.code == 2, result
        assert all(word in result.err for word in words), result.err
    assert not (tmp_path / "out").exists()


def test_two_writers(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"):
        result = run(*recording(tmp_path, "t0ho"))
    assert (result.code, "being written to" in result.err) == (2, True)


def test_damaged_folders(tmp_path: Path) -> None:
    fails(ResultsError, "no recording", "phatgoose record", action=lambda: read_recording(tmp_path))
    succeed(*recording(tmp_path, "t0ho"))
    path = tmp_path / "t0ho.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    fails(ResultsError, "t0ho.safetensors cannot be read", "delete the file", action=lambda: read_recording(tmp_path))
    path.unlink()
    assert read_recording(tmp_path).tasks == {}
    path.write_bytes(whole)
    header = tmp_path / "recording.json"
    text = header.read_text()
    header.write_text(text.replace('"e2"', '"e2", "e3"'))
    fails(ResultsError, "shapes", action=lambda: read_recording(tmp_path))
    header.write_text(text.replace('"format": 1', '"format": 2'))
    fails(ResultsError, "another format", action=lambda: read_recording(tmp_path))
    header.write_text("{")
    fails(ResultsError, "recording.json cannot be read", action=lambda: read_recording(tmp_path))
