"""Import of official PHATGOOSE checkpoints as a pool of PEFT adapters with gates.

Tensor names in r-three/phatgoose, where i is an expert's number:

    <module>._addons.expert_lora.layer1__<i>          [in, r]    A transposed
    <module>._addons.expert_lora.layer2__<i>          [r, out]   B transposed
    <module>._addons.router.expert_embeddings__<i>    [in]       the gate
    <module>._addons.expert_lora.expert_input_gate    [in]       the gate, while it is trained
    <module>.expert_lora_a, <module>.expert_lora_b    [r, in], [out, r]   one expert, before gate training

The official code divides the update by the rank and has no alpha, so lora_alpha
is 1. Axes: I in-features, O out-features, R rank.
"""

from __future__ import annotations

import pickle
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from phatgoose.errors import CheckpointError
from phatgoose.experts.adapter import PREFIX, WEIGHTS_FILE
from phatgoose.experts.checks import check_new_folder
from phatgoose.experts.expert import Expert, check_name
from phatgoose.experts.pool import Pool
from phatgoose.experts.provenance import GateProvenance
from phatgoose.experts.sites import check_sites
from phatgoose.experts.vectors import save_gate
from phatgoose.files import new_folder, sha256

_EXPERT = re.compile(
    r"(?P<site>.+)\._addons\.(?:expert_lora\.(?P<layer>layer[12])|router\.(?P<gate>expert_embeddings))__(?P<i>\d+)"
)
_TRAINED_GATE = re.compile(r"(?P<site>.+)\._addons\.expert_lora\.expert_input_gate")
_SINGLE = re.compile(r"(?P<site>.+)\.expert_lora_(?P<half>[ab])")
# copies of the base's embeddings, and an empty tensor that the official code trains by accident
_DROPPED = re.compile(r".*embed_tokens\.weight|.*shared\.weight|.*device_probe")


@dataclass
class _Parts:
    """One expert's tensors by site, in PEFT's orientation."""

    a_RI: dict[str, torch.Tensor] = field(default_factory=dict)
    b_OR: dict[str, torch.Tensor] = field(default_factory=dict)
    gate_I: dict[str, torch.Tensor] = field(default_factory=dict)


def import_official(
    checkpoint: str | Path, model: PreTrainedModel, base: str, out: str | Path, names: Sequence[str] | None = None
) -> Pool:
    """Make a pool from a checkpoint of the official code.

    Args:
        checkpoint: a .pt file (loaded with weights_only=True) or a .safetensors file.
        model: the base model to compare shapes with; a model on the meta device is enough.
        base: the base model's name, for the manifest.
        out: folder of the new pool.
        names: names of the experts by number; by default "expert-00", "expert-01", ...

    Raises:
        CheckpointError: the file cannot be read, or is not a checkpoint of the official code.
        BaseModelError: an expert does not fit the base model.
        ConfigError: a name is not a valid expert name.
        PoolError: `out` is not empty.
    """
    checkpoint, out = Path(checkpoint), Path(out)
    check_new_folder(out)
    experts = _sort_keys(checkpoint, _read(checkpoint))
    if names is None:
        names = [f"expert-{i:02d}" for i in range(len(experts))]
    if len(names) != len(experts) or len(set(names)) != len(names):
        raise CheckpointError(
            f"the names do not fit {checkpoint}",
            found=f"{len(names)} names, {len(set(names))} different",
            expected=f"{len(experts)} different names",
            fix="--names with one name for each expert, in the order of their numbers",
        )
    with new_folder(out) as temporary, tempfile.TemporaryDirectory(dir=out.parent, prefix=".import.") as scratch:
        folders = [Path(scratch) / check_name(name) for name in names]
        for folder, parts in zip(folders, experts, strict=True):
            _write_expert(checkpoint, folder, parts, base, model.config.is_encoder_decoder)
        check_sites(model, [Expert(folder) for folder in folders])
        pool = Pool.create(temporary, base)
        for folder in folders:
            pool.add(folder, source=checkpoint.name)
    return Pool.open(out)


def _read(checkpoint: Path) -> dict[str, torch.Tensor]:
    try:
        if checkpoint.suffix == ".safetensors":
            return load_file(checkpoint)
        tensors = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, SafetensorError, EOFError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {checkpoint}",
            found=str(error).splitlines()[0],
            expected="a .pt file of tensors only, or a .safetensors file",
            fix="download it again",
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(
            f"{checkpoint} is not a state dict", found=type(tensors).__name__, expected="names and tensors"
        )
    return tensors


def _sort_keys(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> list[_Parts]:
    experts: dict[int, _Parts] = {}
    for key, tensor in tensors.items():
        if match := _EXPERT.fullmatch(key):
            parts = experts.setdefault(int(match["i"]), _Parts())
            if match["gate"]:
                parts.gate_I[match["site"]] = tensor.flatten()
            else:
                half = parts.a_RI if match["layer"] == "layer1" else parts.b_OR
                half[match["site"]] = tensor.T
        elif match := _TRAINED_GATE.fullmatch(key):
            experts.setdefault(0, _Parts()).gate_I[match["site"]] = tensor.flatten()
        elif match := _SINGLE.fullmatch(key):
            parts = experts.setdefault(0, _Parts())
            (parts.a_RI if match["half"] == "a" else parts.b_OR)[match["site"]] = tensor
        elif not _DROPPED.fullmatch(key):
            raise CheckpointError(
                f"{checkpoint} holds a tensor that belongs to no expert",
                found=key,
                expected="<module>._addons.expert_lora.layer1__<i> and its like",
                fix="give a checkpoint that the official code's concatenate.py wrote",
            )
    _check_complete(checkpoint, experts)
    return [experts[i] for i in sorted(experts)]


def _check_complete(checkpoint: Path, experts: dict[int, _Parts]) -> None:
    if sorted(experts) != list(range(len(experts))) or not experts:
        raise CheckpointError(
            f"{checkpoint} has gaps in its experts' numbers", found=str(sorted(experts)), expected="0, 1, 2, ..."
        )
    for i, parts in experts.items():
        unlike = set(parts.a_RI) ^ set(parts.b_OR)
        if parts.gate_I:
            unlike |= set(parts.a_RI) ^ set(parts.gate_I)
        if unlike:
            raise CheckpointError(
                f"{checkpoint}: expert {i} is incomplete",
                found=f"not all of A, B and gate at {min(unlike)}",
                expected="A and B, and a gate everywhere or nowhere",
            )
        ranks = {a_RI.shape[0] for a_RI in parts.a_RI.values()}
        if len(ranks) != 1:
            raise CheckpointError(
                f"{checkpoint}: expert {i} has several ranks", found=str(sorted(ranks)), expected="one"
            )


def _write_expert(checkpoint: Path, folder: Path, parts: _Parts, base: str, encoder_decoder: bool) -> None:
    from peft import LoraConfig

    folder.mkdir()
    (rank,) = {a_RI.shape[0] for a_RI in parts.a_RI.values()}
    LoraConfig(
        r=rank,
        lora_alpha=1,
        target_modules=sorted(parts.a_RI),
        task_type="SEQ_2_SEQ_LM" if encoder_decoder else "CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    ).save_pretrained(str(folder))
    tensors = {f"{PREFIX}{site}.lora_A.weight": t.contiguous() for site, t in parts.a_RI.items()}
    tensors |= {f"{PREFIX}{site}.lora_B.weight": t.contiguous() for site, t in parts.b_OR.items()}
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    if parts.gate_I:
        provenance = GateProvenance(
            base=base,
            revision=None,
            data=None,
            adapter_sha256=sha256(folder / WEIGHTS_FILE),
            steps=100,
            learning_rate=5e-3,
            seed=42,
            settings={"imported_from": checkpoint.name, "note": "steps, rate and seed are the official script's"},
        )
        save_gate(folder, parts.gate_I, provenance)
