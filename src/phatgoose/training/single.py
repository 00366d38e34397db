"""Training an adapter, and then its gate, with PEFT and transformers' Trainer.

Both keep their checkpoints in a work folder beside the result. A run that was
killed and is started again with the same settings goes on from the last one;
the result appears in one step at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import AdapterTrainingConfig, Dtype, GateConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.errors import AdapterError, ConfigError, GateError
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.vectors import save_gate
from phatgoose.files import sha256
from phatgoose.models.base import DTYPES, base_id
from phatgoose.training.gated import GatedModel
from phatgoose.training.lora import new_lora, save_lora
from phatgoose.training.run import check_out, describe, diverged, gate_provenance, gate_save_steps, is_main_process
from phatgoose.training.trainer import run_trainer


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

    Paper section 3.1; see `phatgoose.training.gated`. Base and adapter stay bit-identical.

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
