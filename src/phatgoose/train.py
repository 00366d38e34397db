"""Training an adapter, and then its gate, with PEFT and transformers' Trainer.

Both keep their checkpoints in a work folder beside the result. A run that was
killed and is started again with the same settings goes on from the last one;
the result appears in one step at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose import __version__
from phatgoose.adapter import WEIGHTS_FILE
from phatgoose.base import DTYPES, base_id
from phatgoose.config import AdapterTrainingConfig, Dtype, GateConfig, OptimizerConfig, TextConfig
from phatgoose.data import Encoder, Example, fingerprint
from phatgoose.errors import AdapterError, ConfigError, GateError
from phatgoose.expert import Expert
from phatgoose.files import sha256
from phatgoose.gate import GateProvenance, save_gate
from phatgoose.gated import GatedModel
from phatgoose.lora import new_lora, save_lora
from phatgoose.trainer import run_trainer


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    out: str | Path,
    *,
    config: AdapterTrainingConfig | None = None,
    text: TextConfig | None = None,
    validation: Sequence[Example] = (),
    save_dtype: Dtype = "fp32",
) -> Path:
    """Train a LoRA adapter on the frozen `model` and save it as PEFT does.

    The loss is the mean cross-entropy over target tokens (with accumulation:
    the mean of the forward passes' means, as in the official code).

    Args:
        model: the base model; its weights are not changed.
        tokenizer: of the base model.
        examples: training data.
        out: folder to make. `<out>.training` holds the checkpoints meanwhile.
        config: settings.
        text: how examples become tokens.
        validation: if given, the checkpoint with the lowest loss on it is kept.
        save_dtype: of the numbers on disk.

    Returns:
        `out`.

    Raises:
        AdapterError: `out` exists already, or the training diverged.
        ConfigError: `config` names layers that cannot be adapted or wants joint
            gates, or an unfinished run with other settings lies in the work folder.
    """
    if config is not None and config.joint_gates:
        raise ConfigError("a gate is trained together with its adapter only among many", fix="phatgoose train-many")
    config, text, out = config or AdapterTrainingConfig(), text or TextConfig(), Path(out)
    check_out(out)
    encoder = Encoder(tokenizer, model.config, text)
    work = out.with_name(out.name + ".training")
    run = describe(config, text, model, examples, validation)
    with new_lora(model, config) as peft_model:
        run_trainer(
            peft_model, encoder, examples, config, work, run, save_steps=config.save_steps, validation=validation
        )
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        if not all(torch.isfinite(p).all() for p in trained):
            if is_main_process():
                shutil.rmtree(work)
            raise AdapterError(**diverged(f"adapter {out}", config))
        if is_main_process():
            save_lora(peft_model, out, base_id(model).name, DTYPES[save_dtype])
            shutil.rmtree(work)
    return out


def check_out(out: Path) -> None:
    """Raise AdapterError if something lies where a new adapter is to be made."""
    if out.exists():
        raise AdapterError(
            f"{out} exists already", expected="a new folder", fix="choose another --out, or delete it first"
        )


def train_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert: Expert,
    examples: Sequence[Example],
    *,
    config: GateConfig | None = None,
    text: TextConfig | None = None,
    save_dtype: Dtype = "fp32",
) -> dict[str, torch.Tensor]:
    """Train an expert's gate with everything else frozen, and write it into the expert's folder.

    Paper section 3.1; see `phatgoose.gated`. Base and adapter stay bit-identical.

    Args:
        model: the base model that the expert's adapter was trained on.
        tokenizer: of the base model.
        expert: its folder gets gate.safetensors and gate_config.json.
        examples: the data that the adapter was trained on.
        config: settings.
        text: how examples become tokens; as for the adapter.
        save_dtype: of the numbers on disk.

    Returns:
        Site -> v, shape (in-features,), fp32.

    Raises:
        BaseModelError: the expert does not fit the model.
        AdapterError: the expert's weights are damaged.
        GateError: the training diverged.
    """
    config, text = config or GateConfig(), text or TextConfig()
    encoder = Encoder(tokenizer, model.config, text)
    run = describe(config, text, model, examples) | {"adapter_sha256": sha256(expert.folder / WEIGHTS_FILE)}
    gated = GatedModel(model, expert)
    work = expert.folder.with_name(expert.folder.name + ".gating")
    try:
        run_trainer(gated, encoder, examples, config, work, run, save_steps=gate_save_steps(config))
        vectors = {site: v.detach().cpu() for site, v in gated.gates().items()}
    finally:
        gated.unwrap()
    if not all(torch.isfinite(v).all() for v in vectors.values()):
        if is_main_process():
            shutil.rmtree(work)
        raise GateError(**diverged(f"the gate of {expert.folder}", config))
    if is_main_process():
        save_gate(
            expert.folder,
            vectors,
            gate_provenance(model, run["data"], run["adapter_sha256"], config, text),
            DTYPES[save_dtype],
        )
        shutil.rmtree(work)
    return vectors


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
        phatgoose=__version__,
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
