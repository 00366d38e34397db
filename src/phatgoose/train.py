"""Training an adapter, and then its gate, with PEFT and transformers' Trainer.

Both keep their checkpoints in a work folder beside the result. A run that was
killed and is started again with the same settings goes on from the last one;
the result appears in one step at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from phatgoose import __version__
from phatgoose.adapter import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.base import DTYPES, base_id, base_source
from phatgoose.config import AdapterTrainingConfig, Dtype, GateConfig, OptimizerConfig, TextConfig
from phatgoose.data import Encoder, Example, fingerprint
from phatgoose.errors import AdapterError, ConfigError, GateError
from phatgoose.expert import Expert
from phatgoose.files import new_folder, replacing, sha256, write_json
from phatgoose.gate import GateProvenance, save_gate
from phatgoose.gated import GatedModel
from phatgoose.sites import linear_shape
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
        ConfigError: `config` names layers that cannot be adapted, or an unfinished
            run with other settings lies in the work folder.
    """
    config, text, out = config or AdapterTrainingConfig(), text or TextConfig(), Path(out)
    check_out(out)
    encoder = Encoder(tokenizer, model.config, text)
    set_seed(config.seed)
    targets = config.target_modules
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha if config.alpha is not None else config.rank,  # type: ignore[arg-type]
        target_modules=targets if targets == "all-linear" else [name.strip() for name in targets.split(",")],
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
        revision=base_id(model).revision,
    )
    try:
        peft_model = get_peft_model(model, lora)
    except ValueError as error:
        raise ConfigError("PEFT cannot adapt this base model so", found=str(error).splitlines()[0]) from error
    # PEFT looks the base up whenever it saves a checkpoint: let it find an embedded one on this machine
    peft_model.peft_config["default"].base_model_name_or_path = base_source(base_id(model).name)
    work = out.with_name(out.name + ".training")
    run = _describe(config, text, model, examples, validation)
    try:
        _check_targets(peft_model)
        run_trainer(
            peft_model, encoder, examples, config, work, run, save_steps=config.save_steps, validation=validation
        )
        trained = [p for p in peft_model.parameters() if p.requires_grad]
        if not all(torch.isfinite(p).all() for p in trained):
            raise AdapterError(**_diverged(f"adapter {out}", config, work))
        if _is_main_process():
            with new_folder(out) as temporary:
                _save_adapter(peft_model, temporary, base_id(model).name, DTYPES[save_dtype])
            shutil.rmtree(work)
    finally:
        peft_model.unload()
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
    base = base_id(model)
    run = _describe(config, text, model, examples)
    run["adapter_sha256"] = sha256(expert.folder / WEIGHTS_FILE)
    gated = GatedModel(model, expert)
    work = expert.folder.with_name(expert.folder.name + ".gating")
    try:
        run_trainer(gated, encoder, examples, config, work, run, save_steps=max(1, config.steps // 4))
        vectors = {site: v.detach().cpu() for site, v in gated.gates().items()}
    finally:
        gated.unwrap()
    if not all(torch.isfinite(v).all() for v in vectors.values()):
        raise GateError(**_diverged(f"the gate of {expert.folder}", config, work))
    if _is_main_process():
        provenance = GateProvenance(
            base=base.name,
            revision=base.revision,
            data=run["data"],
            adapter_sha256=run["adapter_sha256"],
            steps=config.steps,
            learning_rate=config.learning_rate,
            seed=config.seed,
            settings={"training": asdict(config), "text": asdict(text)},
            phatgoose=__version__,
        )
        save_gate(expert.folder, vectors, provenance, DTYPES[save_dtype])
        shutil.rmtree(work)
    return vectors


def _describe(
    config: OptimizerConfig,
    text: TextConfig,
    model: PreTrainedModel,
    examples: Sequence[Example],
    validation: Sequence[Example] = (),
) -> dict[str, Any]:
    return {
        **asdict(config),
        **asdict(text),
        "base": str(base_id(model)),
        "data": fingerprint(examples),
        "validation": fingerprint(validation) if validation else None,
    }


def _check_targets(peft_model: Any) -> None:
    """PEFT can adapt embeddings and convolutions too; a router cannot mix those."""
    for name, module in peft_model.base_model.model.named_modules():
        if isinstance(module, LoraLayer) and linear_shape(module.get_base_layer()) is None:
            raise ConfigError(
                f"{name} cannot be adapted",
                found=type(module.get_base_layer()).__name__,
                expected="names of linear layers",
                fix="--target-modules all-linear",
            )


def _diverged(what: str, config: OptimizerConfig, work: Path) -> dict[str, str]:
    """An error's text. The checkpoints go: another try has other settings, and would trip over them."""
    if _is_main_process():
        shutil.rmtree(work)
    return {
        "what": f"{what} is not finite after {config.steps} steps",
        "found": "NaN or infinity",
        "expected": "finite numbers",
        "fix": f"--learning-rate, lower than {config.learning_rate:g}",
    }


def _save_adapter(peft_model: Any, folder: Path, base: str, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    peft_model.save_pretrained(str(folder))
    weights = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS_FILE).items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    write_json(folder / CONFIG_FILE, config)


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
