"""Training one adapter, and then its gate, with PEFT and transformers' Trainer.

Both keep their checkpoints in a work folder beside the result and resume from the
last one when they are called again (phatgoose.training.run). The result appears in
one step at the end.
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
from phatgoose.errors import AdapterError, GateError
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.vectors import save_gate
from phatgoose.files import sha256
from phatgoose.models.base import DTYPES, base_id
from phatgoose.training.gated import GatedModel
from phatgoose.training.lora import new_lora, save_lora
from phatgoose.training.run import (
    ADAPTER_WORK,
    GATE_WORK,
    check_out,
    describe,
    describe_data,
    diverged,
    gate_provenance,
    gate_save_steps,
    is_main_process,
)
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
    """Train a LoRA adapter on the frozen `model` and save it in PEFT's format (paper section 4.1).

    The loss is the mean cross-entropy over target tokens; with accumulation, the mean
    of the forward passes' means, as in the official code. A killed run resumes from its
    last checkpoint when the call is repeated.

    Args:
        model: the base model; its weights are not changed.
        tokenizer: the base model's tokenizer.
        examples: training data.
        out: folder to create. Until then, `<out>.training` holds the checkpoints.
        config: settings of the training; None for the defaults.
        text: how examples become tokens; None for the defaults.
        validation: if given, the checkpoint with the lowest loss on it is kept.
        save_dtype: dtype of the saved tensors.

    Returns:
        `out`.

    Raises:
        AdapterError: `out` exists already, or the training diverged.
        ConfigError: `config` names layers that cannot be adapted, or the work folder
            holds an unfinished run with other settings.
    """
    config, text, out = config or AdapterTrainingConfig(), text or TextConfig(), Path(out)
    check_out(out)
    encoder = Encoder(tokenizer, model.config, text)
    work = out.with_name(out.name + ADAPTER_WORK)
    run = describe(config, text, model, **describe_data(examples, validation))
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
    """Train an expert's gate and write it into the expert's folder (paper section 3.1).

    Only the gate is trained, one vector v for each adapted layer: y = W u + s B A u * sigmoid(v . u)
    with v = 0 at the start. Base model and adapter stay bit-identical. A killed run
    resumes from its last checkpoint when the call is repeated.

    Args:
        model: the base model that the expert's adapter was trained on.
        tokenizer: the base model's tokenizer.
        expert: the expert; its folder gets gate.safetensors and gate_config.json. Until
            then, `<folder>.gating` holds the checkpoints.
        examples: the adapter's training data.
        config: settings of the training; None for the defaults.
        text: how examples become tokens, the same as for the adapter; None for the defaults.
        save_dtype: dtype of the saved tensors.

    Returns:
        Site -> v, shape (in-features,), fp32.

    Raises:
        BaseModelError: the expert does not fit the model.
        AdapterError: the expert's weights are damaged.
        ConfigError: the work folder holds an unfinished run with other settings.
        GateError: the training diverged.
    """
    config, text = config or GateConfig(), text or TextConfig()
    encoder = Encoder(tokenizer, model.config, text)
    adapter_sha256 = sha256(expert.folder / WEIGHTS_FILE)
    run = describe(config, text, model, **describe_data(examples), adapter_sha256=adapter_sha256)
    work = expert.folder.with_name(expert.folder.name + GATE_WORK)
    gated = GatedModel(model, expert)
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
        provenance = gate_provenance(model, run["data"], adapter_sha256, config, text)
        save_gate(expert.folder, vectors, provenance, DTYPES[save_dtype])
        shutil.rmtree(work)
    return vectors
