"""The recipes, from raw files to scores, at tiny size."""

from __future__ import annotations

import gzip
import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import as_text, llama, make_base, make_data, token_ids

from phatgoose.pool import Pool

RECIPES = Path(__file__).parent.parent / "recipes"
METHODS = {"base", "own expert", "top-1", "top-2", "left out"}


def write_choices(file: Path) -> None:
    """A dataset of questions with two answers."""
    rows = []
    for i in range(16):
        question, answers = token_ids(5, seed=i).tolist(), ["<10> <11>", "<12>"]
        split = "validation" if i >= 12 else "train"
        row = {"input": as_text(question), "target": answers[i % 2], "choices": answers, "split": split}
        rows.append(json.dumps(row) + "\n")
    file.write_bytes(gzip.compress("".join(rows).encode()))


def times(folder: Path) -> dict[Path, int]:
    """When each file was written last, but for the scores."""
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "scores.json"
    }


def test_demo_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = make_base(llama, tmp_path / "tiny-llama"), tmp_path / "out"
    make_data(tmp_path / "words.jsonl.gz", rows=16)
    write_choices(tmp_path / "answers.jsonl.gz")
    options = {
        "--data": tmp_path, "--out": out, "--base": base, "--rank": 2, "--steps": 4, "--gate-steps": 3,
        "--batch-size": 4, "--dtype": "fp32", "--jobs": 1, "--examples": 3,
    }  # fmt: skip
    args = [str(RECIPES / "demo_pool.py"), *(str(part) for pair in options.items() for part in pair)]
    args += ["--datasets", "words", "answers"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process, so that sums round alike
    first = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == 0, first.stderr
    assert "words: adapter and gate are done" in first.stdout

    pool = Pool.open(out / "pool")
    assert pool.names == ("words", "answers")
    assert pool.check(llama()) == []
    assert all(expert.has_gate for expert in pool.experts())
    assert {path.name for path in (out / "experts").iterdir()} == {"words", "answers"}  # no work folder is left
    scores = json.loads((out / "scores.json").read_text())
    for name in ("words", "answers"):
        assert set(scores[name]) == METHODS
        for found in scores[name].values():
            assert found["num_examples"] == 3
            assert (found["accuracy"] is None) == (name == "words")
    assert scores["words"]["base"]["loss"] != scores["words"]["own expert"]["loss"]

    before = times(out)
    monkeypatch.setattr(sys, "argv", args)
    runpy.run_path(args[0], run_name="__main__")
    assert "are done" not in capsys.readouterr().out
    assert times(out) == before
    assert json.loads((out / "scores.json").read_text()) == scores
