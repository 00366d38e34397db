"""The scripts in examples/ run as they stand."""

from __future__ import annotations

import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers.models import llama, make_base
from helpers.pages import ROOT
from helpers.pools import make_pool
from phatgoose.experts.pool import Pool

EXAMPLES = ROOT / "examples"


def main_of(name: str) -> Callable[..., None]:
    main: Callable[..., None] = runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]
    return main


@pytest.fixture(params=["tiny", pytest.param("demo", marks=pytest.mark.slow)])
def pool(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    """The demo's pool, or one of a tiny model."""
    if request.param == "demo":
        return Pool.open(ROOT / "demo/pool")
    monkeypatch.chdir(tmp_path)
    make_base(llama, tmp_path / "tiny-llama")
    return make_pool(llama, tmp_path)


def run(name: str, pool: Pool, *arguments: str) -> None:
    main = main_of(name)
    main.__globals__["POOL"] = pool.folder
    main(*arguments)


def test_route_names_the_expert_of_each_token(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    run("route", pool, "<5> <6> <7>")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.endswith("%")]
    assert len(rows) >= 4
    assert {row[-2] for row in rows} <= set(pool.names)
    assert all(0 < int(row[-1].removesuffix("%")) <= 100 for row in rows)


def test_a_router_of_your_own_answers(pool: Pool, capsys: pytest.CaptureFixture[str]) -> None:
    run("new_router", pool)
    assert capsys.readouterr().out.strip()


def test_train_expert_makes_a_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_base(llama, tmp_path / "tiny-llama")
    main_of("train_expert")(str(EXAMPLES / "capitals.jsonl"), "out", "tiny-llama")
    pool = Pool.open("out/pool")
    assert pool.names == ("capitals",)
    assert pool.check() == []
    provenance = json.loads((pool.expert("capitals").folder / "gate_config.json").read_text())
    assert provenance["steps"] == 10
