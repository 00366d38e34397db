"""A new LoRA on a base model, through PEFT: create, read and save it.

Axes: E experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, set_seed

from phatgoose.config import AdapterTrainingConfig
from phatgoose.errors import ConfigError
from phatgoose.experts.adapter import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.sites import linear_shape
from phatgoose.files import new_folder, replacing, write_json
from phatgoose.models.base import base_id, base_source


@contextmanager
def new_lora(model: PreTrainedModel, config: AdapterTrainingConfig) -> Iterator[PeftModel]:
    """Yield `model` with a new, untrained LoRA; afterwards `model` is as it was.

    Equal seeds give equal initial values.

    Args:
        model: the base model.
        config: rank, alpha, target modules and seed.

    Raises:
        ConfigError: `config` names layers that cannot be adapted.
    """
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
        reason = str(error).splitlines()[0]
        raise ConfigError("PEFT cannot adapt this base model with these settings", found=reason) from error
    # PEFT looks the base up whenever it saves a checkpoint: an embedded one is found in the cache folder
    peft_model.peft_config["default"].base_model_name_or_path = base_source(base_id(model).name)
    try:
        for site, layer in lora_layers(peft_model).items():
            _check_linear(site, layer)
        yield peft_model
    finally:
        peft_model.unload()


def lora_layers(peft_model: PeftModel) -> dict[str, Any]:
    """Site -> the LoRA layer that PEFT put there."""
    base: Any = peft_model.get_base_model()
    return {name: m for name, m in base.named_modules() if isinstance(m, LoraLayer)}


def initial_factors(layers: Mapping[str, Any], num_experts: int) -> dict[str, torch.Tensor]:
    """PEFT's initial values, the same for each expert: "<site>.a", shape (E, R, I), and "<site>.b", shape (E, R, O)."""
    factors = {}
    for site, layer in layers.items():
        a_RI, b_OR = layer.lora_A["default"].weight.detach(), layer.lora_B["default"].weight.detach()
        factors[site + ".a"] = a_RI.expand(num_experts, -1, -1)
        factors[site + ".b"] = b_OR.T.expand(num_experts, -1, -1)
    return factors


def load_factors(layers: Mapping[str, Any], factors: Mapping[str, torch.Tensor]) -> None:
    """Copy one expert's values into PEFT's layers: "<site>.a", shape (R, I), and "<site>.b", shape (R, O)."""
    with torch.no_grad():
        for site, layer in layers.items():
            layer.lora_A["default"].weight.copy_(factors[site + ".a"])
            layer.lora_B["default"].weight.copy_(factors[site + ".b"].T)


def save_lora(peft_model: PeftModel, out: Path, base: str, dtype: torch.dtype) -> None:
    """Save the adapter in PEFT's format; `out` appears in one step.

    Args:
        peft_model: the model with the adapter.
        out: folder to create.
        base: name of the base model, for adapter_config.json.
        dtype: dtype of the saved tensors.
    """
    with new_folder(out) as folder:
        peft_model.save_pretrained(str(folder))
        weights = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS_FILE).items()}
        with replacing(folder / WEIGHTS_FILE) as temporary:
            save_file(weights, temporary, metadata={"format": "pt"})
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base
        write_json(folder / CONFIG_FILE, config)


def _check_linear(site: str, layer: LoraLayer) -> None:
    """Refuse a layer that is not linear: PEFT adapts embeddings and convolutions too, which routers cannot mix."""
    if linear_shape(layer.get_base_layer()) is None:
        raise ConfigError(
            f"{site} cannot be adapted",
            found=type(layer.get_base_layer()).__name__,
            expected="names of linear layers",
            fix="--target-modules all-linear",
        )
