"""Every command takes what it took in 0.1.0.

options_0_1_0.json is what `parameters_of` gave for that version.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.cli import run
from helpers.options import parameters_of
from phatgoose.cli import app

THEN: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("options_0_1_0.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("command", THEN)
def test_parameters_are_as_they_were(command: str) -> None:
    then, now = THEN[command], parameters_of(app)[command]
    assert {name: now.get(name) for name in then} == then
    assert [name for name in now.keys() - then.keys() if now[name]["required"]] == []


@pytest.mark.parametrize("command", THEN)
def test_arguments_keep_their_order(command: str) -> None:
    then, now = ([name for name in of[command] if name.isupper()] for of in (THEN, parameters_of(app)))
    assert now[: len(then)] == then


def test_joint_gates_are_a_recipes(tmp_path: Path) -> None:
    """The one flag that no longer does what it did: it names the recipe that does."""
    result = run("train-many", "a.jsonl", "--base", "tiny-llama", "--out", tmp_path / "out", "--joint-gates")
    assert (result.code, result.out) == (2, "")
    assert "--joint-gates" in result.err and "python recipes/ocean" in result.err
    assert list(tmp_path.iterdir()) == []
