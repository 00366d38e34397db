"""Settings: the paper's defaults, and values that cannot be used."""

from __future__ import annotations

import tomllib
from dataclasses import FrozenInstanceError, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

import phatgoose
from helpers.checks import fails
from phatgoose.config import AdapterTrainingConfig, GateConfig, PrototypeConfig, RouterConfig, TextConfig
from phatgoose.errors import ConfigError


def test_defaults_are_the_paper() -> None:
    gate = GateConfig()
    assert (gate.steps, gate.learning_rate, gate.weight_decay, gate.warmup_steps) == (100, 5e-3, 0.0, 6)
    router = RouterConfig()
    assert (router.router, router.top_k, router.eps, router.temperature) == ("phatgoose", 2, 1e-5, 1.0)
    adapter = AdapterTrainingConfig()
    assert (adapter.rank, adapter.target_modules, adapter.warmup_steps) == (16, "all-linear", 60)
    assert (TextConfig().max_input_tokens, TextConfig().max_target_tokens) == (512, 512)


@pytest.mark.parametrize(("steps", "warmup"), [(3, 0), (16, 0), (17, 1), (100, 6), (1000, 60)])
def test_warmup_is_rounded_down(steps: int, warmup: int) -> None:
    assert GateConfig(steps=steps).warmup_steps == warmup


NAN = float("nan")
BAD: list[tuple[Any, dict[str, Any]]] = [
    (RouterConfig, {"top_k": 0}),
    (RouterConfig, {"eps": -1e-9}),
    (RouterConfig, {"eps": NAN}),
    (RouterConfig, {"temperature": 0.0}),
    (RouterConfig, {"temperature": NAN}),
    (TextConfig, {"max_input_tokens": 0}),
    (TextConfig, {"max_target_tokens": -1}),
    (PrototypeConfig, {"num_examples": 0}),
    (PrototypeConfig, {"batch_size": 0}),
    (PrototypeConfig, {"seed": -1}),
    (GateConfig, {"steps": 0}),
    (GateConfig, {"batch_size": 0}),
    (GateConfig, {"accumulation": 0}),
    (GateConfig, {"warmup_ratio": 1.5}),
    (GateConfig, {"warmup_ratio": NAN}),
    (GateConfig, {"learning_rate": 0.0}),
    (GateConfig, {"learning_rate": NAN}),
    (GateConfig, {"clip": -1.0}),
    (GateConfig, {"weight_decay": -0.1}),
    (GateConfig, {"dtype": "fp8"}),
    (AdapterTrainingConfig, {"rank": 0}),
    (AdapterTrainingConfig, {"save_steps": 0}),
    (AdapterTrainingConfig, {"alpha": 0.0}),
]


@pytest.mark.parametrize(("config", "values"), BAD, ids=lambda part: getattr(part, "__name__", str(part)))
def test_a_value_that_cannot_be_used(config: Any, values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    error = fails(ConfigError, name, action=lambda: config(**values))
    assert str(value) in str(error.found)


@pytest.mark.parametrize("config", [RouterConfig, TextConfig, GateConfig, AdapterTrainingConfig])
def test_settings_are_named_and_stay(config: Any) -> None:
    settings = config()
    first = fields(config)[0].name
    with pytest.raises(FrozenInstanceError):
        setattr(settings, first, getattr(settings, first))
    with pytest.raises(TypeError):
        config(getattr(settings, first))
    with pytest.raises(TypeError, match="frogs"):
        config(frogs=1)


def test_version_is_the_installed_one_or_the_checkouts(monkeypatch: pytest.MonkeyPatch) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    version = pyproject["project"]["version"]
    assert phatgoose.__version__ == metadata.version("phatgoose") == version

    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert phatgoose.__version__ == version
