"""Grids that cannot run, or not all of it; and how methods are named."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.checks import files_of
from helpers.cli import run, succeed
from helpers.grids import grid, make_grid, rows_of
from helpers.models import llama
from helpers.pools import make_pool
from phatgoose.evaluation.methods import parse_methods
from phatgoose.experts.pool import Pool


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("template"))


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "here"))
    return tmp_path / "here"


def test_other_pools_and_settings_are_refused(here: Path) -> None:
    succeed(*grid("phatgoose", task="rte"))
    before = files_of(here / "out")
    other = make_pool(llama, here / "more", 2)
    for changes, words in (
        ({"pool": "more/pool"}, [Pool.open("pool").fingerprint, other.fingerprint, "--out"]),
        ({"limit": 5}, ["limit", "None", "expected: 5"]),
        ({"separator": "<4>"}, ["text", "<4>"]),
        ({"dtype": "bf16"}, ["dtype", "bf16"]),
    ):
        result = run(*grid("phatgoose", **({"task": "rte"} | changes)))
        assert result.code == 2
        assert all(word in result.err for word in words), result.err
    assert "is not a folder" in run(*grid("phatgoose", out="pool/pool.json")).err
    (here / "out" / "rows.jsonl").write_text("{}\n")
    assert "line 1" in run(*grid("phatgoose", task="rte")).err
    assert set(files_of(here / "out")) == set(before)


def test_missing_data(here: Path) -> None:
    (here / "data" / "t0ho" / "rendered" / "cb.jsonl.gz").unlink()
    result = run(*grid("phatgoose"))
    assert result.code == 2 and "t0ho_cb has no data" in result.err and "--skip-missing" in result.err
    assert not (here / "out").exists()
    result = run(*grid("phatgoose"), "--skip-missing")
    assert result.code == 0 and "left out: task t0ho_cb" in result.err
    assert [row["task"] for row in rows_of(here / "out")] == ["rte"]
    assert run(*grid("phatgoose", out="none", task="cb"), "--skip-missing").code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (grid("nearest"), ["unknown router 'nearest'", "phatgoose", "arrow", "base", "own", "expert:NAME"]),
        (grid("expert:nobody"), ["nobody", "e0, e1, e2"]),
        (grid("phatgoose top_k=9"), ["top_k 9", "3 experts"]),
        (grid("phatgoose topk=1"), ["topk=1", "top_k"]),
        (grid("phatgoose top_k=few"), ["top_k=few", "NAME=NUMBER"]),
        (grid("phatgoose temperature=0"), ["temperature"]),
        (grid("own"), ["held-in"]),
        (grid("phatgoose top_k=1", pool="gateless"), ["gate", "bare", "phatgoose gate"]),
        (grid("phatgoose", suite="t0h0"), ["t0h0", "leave-one-out"]),
        (grid("phatgoose", task="rta"), ["rta", "storycloze"]),
        (grid("phatgoose", limit=0), ["limit"]),
        (grid("phatgoose", seed="one"), ["seeds", "one"]),
        (grid("phatgoose", seed="4294967296"), ["seeds", "4294967295"]),
        (grid("phatgoose", batch_tokens=0), ["batch_tokens"]),
        (grid("phatgoose", answer_tokens=0), ["answer_tokens"]),
        (grid("phatgoose", base="org/other"), ["org/other", "tiny-llama"]),
    ],
    ids=lambda value: value[-1] if isinstance(value[0], str) and value[0] != "eval" else "",
)
def test_what_cannot_run_fails_first(arguments: list[str], words: list[str], here: Path) -> None:
    """Before the base is loaded, and without a trace on disk."""
    shutil.rmtree(here / "tiny-llama")
    result = run(*arguments)
    assert result.code == 2
    assert all(word in result.err for word in words), result.err
    assert not (here / "out").exists()


def test_names_of_methods(here: Path) -> None:
    pool = Pool.open("pool")
    texts = ["phatgoose", "phatgoose top_k=2", "phatgoose  temperature=0.5 top_k=1", "merged", "base", "experts"]
    assert [method.name for method in parse_methods(texts, pool)] == [
        "phatgoose", "phatgoose top_k=1 temperature=0.5", "merged", "base", "expert:e0", "expert:e1", "expert:e2"
    ]  # fmt: skip
    names = [method.name for method in parse_methods(["phatgoose", "phatgoose top_k=2", "merged"], pool, top_k=3)]
    assert names == ["phatgoose top_k=3", "phatgoose", "merged"]
