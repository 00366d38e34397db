"""What makes a training run, and how it resumes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from phatgoose.config import GateConfig, OptimizerConfig, TextConfig
from phatgoose.data.examples import Example, fingerprint
from phatgoose.errors import AdapterError, ConfigError
from phatgoose.experts.provenance import GateProvenance
from phatgoose.files import write_json
from phatgoose.models.base import base_id

RUN_FILE = "run.json"


def goes_on(work: Path, run: dict[str, Any]) -> bool:
    """Whether `work` holds an unfinished run; if not, it is made, with the description of a new one.

    Raises:
        ConfigError: the unfinished run has other settings.
    """
    path = work / RUN_FILE
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        return False
    old = json.loads(path.read_text(encoding="utf-8"))
    different = sorted(key for key in old.keys() | run.keys() if old.get(key) != run.get(key))
    if different:
        raise ConfigError(
            f"{work} holds an unfinished run with other settings",
            found=f"{different[0]}: {old.get(different[0])!r}",
            expected=f"{run.get(different[0])!r}",
            fix=f"use the old settings to go on, or delete {work} to begin anew",
        )
    return True


def check_out(out: Path) -> None:
    """Raise AdapterError if something lies where a new adapter is to be made."""
    if out.exists():
        raise AdapterError(
            f"{out} exists already", expected="a new folder", fix="choose another --out, or delete it first"
        )


def gate_save_steps(config: GateConfig) -> int:
    """Steps between checkpoints of a gate's training."""
    return max(1, config.steps // 4)


def gate_provenance(
    model: PreTrainedModel, data: str, adapter_sha256: str, config: OptimizerConfig, text: TextConfig
) -> GateProvenance:
    """How a gate was made, from the fingerprints of its data and adapter and the settings."""
    base = base_id(model)
    return GateProvenance(
        base=base.name,
        revision=base.revision,
        data=data,
        adapter_sha256=adapter_sha256,
        steps=config.steps,
        learning_rate=config.learning_rate,
        seed=config.seed,
        settings={"training": asdict(config), "text": asdict(text)},
    )


def describe(
    config: OptimizerConfig,
    text: TextConfig,
    model: PreTrainedModel,
    examples: Sequence[Example],
    validation: Sequence[Example] = (),
) -> dict[str, Any]:
    """Everything that makes a run what it is, as plain data."""
    return {
        **asdict(config),
        **asdict(text),
        "base": str(base_id(model)),
        "data": fingerprint(examples),
        "validation": fingerprint(validation) if validation else None,
    }


def diverged(what: str, config: OptimizerConfig) -> dict[str, str]:
    """An error's text. Its checkpoints must go: another try has other settings, and would trip over them."""
    return {
        "what": f"{what} is not finite after {config.steps} steps",
        "found": "NaN or infinity",
        "expected": "finite numbers",
        "fix": f"--learning-rate, lower than {config.learning_rate:g}",
    }


def is_main_process() -> bool:
    """Whether this process, of those of one training, is the one that writes results."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
