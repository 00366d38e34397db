"""Descriptions of runs: which unfinished run is resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.checks import fails
from helpers.data import make_examples
from helpers.models import llama
from phatgoose.config import AdapterTrainingConfig, TextConfig
from phatgoose.errors import ConfigError
from phatgoose.training.run import describe, describe_data, resumes


def description(**changes: Any) -> dict[str, Any]:
    config = AdapterTrainingConfig(**changes)
    return describe(config, TextConfig(), llama(), **describe_data(make_examples(3, seed=0)))


def test_only_a_run_with_the_same_settings_is_resumed(tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert not resumes(work, description())
    assert resumes(work, description())
    fails(ConfigError, "steps: 1000", "7", "delete", action=lambda: resumes(work, description(steps=7)))
    fails(ConfigError, "data", action=lambda: resumes(work, description() | describe_data(make_examples(3, seed=1))))


@pytest.mark.parametrize("joint", [True, False])
def test_a_run_of_a_version_with_joint_gates(joint: bool, tmp_path: Path) -> None:
    """Such a version wrote `joint_gates` into every description of an adapter."""
    (tmp_path / "run.json").write_text(json.dumps(description() | {"joint_gates": joint}), encoding="utf-8")
    if joint:
        fails(ConfigError, "joint_gates: True", action=lambda: resumes(tmp_path, description()))
    else:
        assert resumes(tmp_path, description())
