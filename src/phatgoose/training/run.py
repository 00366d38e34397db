"""What identifies a training run, and where a killed one resumes.

Every run keeps its checkpoints in a work folder beside its result: `<adapter>.training`
for adapters, `<expert>.gating` for gates; a group's lies beside its first expert. The
folder holds run.json, which `describe` makes. The same call again finds the folder
(`resumes`) and continues from its last checkpoint:

    one adapter or gate    training.trainer.last_checkpoint       checkpoint-<step>/
    a group of experts     training.group.trainer.GroupTrainer    checkpoint.safetensors

When the result is in place the work folder is deleted.
"""

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
ADAPTER_WORK = ".training"
GATE_WORK = ".gating"
# Settings that not every version writes, and the value of runs without them
_IMPLIED = {"joint_gates": False}


def resumes(work: Path, run: dict[str, Any]) -> bool:
    """Whether `work` holds an unfinished run of this description; without one, begin a new run there.

    Args:
        work: folder of the checkpoints; created if it is missing.
        run: description of the run (`describe`); a new run writes it to run.json.

    Raises:
        ConfigError: the unfinished run has other settings.
    """
    path = work / RUN_FILE
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        write_json(path, run)
        return False
    old, new = _IMPLIED | json.loads(path.read_text(encoding="utf-8")), _IMPLIED | run
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if different:
        raise ConfigError(
            f"{work} holds an unfinished run with other settings",
            found=f"{different[0]}: {old.get(different[0])!r}",
            expected=f"{new.get(different[0])!r}",
            fix=f"use the old settings to resume it, or delete {work} to start over",
        )
    return True


def describe(config: OptimizerConfig, text: TextConfig, model: PreTrainedModel, **data: Any) -> dict[str, Any]:
    """Everything that determines a run's result, as plain data.

    Args:
        config: settings of the training.
        text: how examples become tokens.
        model: the base model.
        data: the run's data: `describe_data`, and what else it depends on.
    """
    return {**asdict(config), **asdict(text), "base": str(base_id(model)), **data}


def describe_data(examples: Sequence[Example], validation: Sequence[Example] = ()) -> dict[str, str | None]:
    """Fingerprints of training and validation data; None for no validation data."""
    return {"data": fingerprint(examples), "validation": fingerprint(validation) if validation else None}


def check_out(out: Path) -> None:
    """Raise AdapterError if something exists where a new adapter is to be written."""
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
    """Content of gate_config.json for a gate trained by this code.

    Args:
        model: the base model.
        data: fingerprint of the training data.
        adapter_sha256: sha256 of the adapter's weights file.
        config: settings of the training.
        text: how examples became tokens.
    """
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


def diverged(what: str, config: OptimizerConfig) -> dict[str, str]:
    """Text of the error about a result that is not finite.

    The caller deletes the checkpoints: another try has other settings, which they would refuse.
    """
    return {
        "what": f"{what} is not finite after {config.steps} steps",
        "found": "NaN or infinity",
        "expected": "finite numbers",
        "fix": f"--learning-rate, lower than {config.learning_rate:g}",
    }


def is_main_process() -> bool:
    """Whether this process writes results: the first one of a distributed training, or the only one."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
