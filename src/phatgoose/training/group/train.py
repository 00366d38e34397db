"""Training many adapters, and many gates, at once.

Each result equals that of `train_adapter` and `train_gate`, beyond rounding
and a base model's dropout.

Axes: E experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, GateConfig, OptimizerConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import fingerprint
from phatgoose.errors import AdapterError, ConfigError, GateError
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.sites import check_sites
from phatgoose.experts.stack import stack_sites
from phatgoose.experts.vectors import GATE, save_gate
from phatgoose.files import sha256
from phatgoose.models.base import DTYPES, base_id
from phatgoose.training.group.data import GroupData
from phatgoose.training.group.jobs import TrainingJob, check_names
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora, BatchedModel, needs_mask
from phatgoose.training.group.plan import group_label, training_groups
from phatgoose.training.group.trainer import GroupTrainer, enough_memory
from phatgoose.training.lora import initial_factors, load_factors, lora_layers, new_lora, save_lora
from phatgoose.training.run import describe, diverged, gate_provenance, gate_save_steps
from phatgoose.training.trainer import make_trainer


def train_adapters(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainingJob],
    *,
    config: AdapterTrainingConfig | None = None,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    progress: bool = True,
) -> None:
    """Train a LoRA adapter for each job, several over one forward pass; see `train_adapter`.

    Jobs whose folder is an adapter already are left alone. A run that was
    killed goes on from its last checkpoint when it is called again.

    Args:
        model: the base model; its weights are not changed.
        tokenizer: of the base model.
        jobs: an adapter each.
        config: settings, the same for all.
        text: how examples become tokens.
        batching: how many at once.
        save_dtype: of the numbers on disk.
        progress: whether to show progress bars.

    Raises:
        AdapterError: something else lies in a job's folder, or the training of
            some diverged (the others are finished).
        ConfigError: `config` names layers that cannot be adapted, two jobs have
            one name, an unfinished run with other settings lies in a work
            folder, there are several processes, or too little memory.
        BaseModelError: the base model cannot train many at once.
    """
    config, text = config or AdapterTrainingConfig(), text or TextConfig()
    finished = [has_adapter(job) for job in jobs]
    run = _Run(model, tokenizer, config, text, batching or BatchingConfig(), config.save_steps, ".training", progress)
    lost: list[TrainingJob] = []
    for group, label in run.groups(jobs, finished):
        experts = {job.name: _sources(job) for job in group}
        with new_lora(model, config) as peft_model:
            layers = lora_layers(peft_model)
            initial = initial_factors(layers, len(group))
            if config.joint_gates:
                initial |= _zero_gates(layers, initial)
            matrix = ExpertMatrix(initial, DTYPES[config.dtype])
            kept_EP = run.train(group, experts, matrix, partial(_adapter_layers, layers), label)
            tensors = matrix.split(kept_EP)
            for e, job in enumerate(group):
                if not torch.isfinite(kept_EP[e]).all():
                    lost.append(job)
                elif not job.folder.exists():
                    load_factors(layers, tensors, e)
                    dtype = DTYPES[save_dtype]
                    gate = partial(_save_joint_gate, model, tensors, e, experts[job.name]["data"], config, text, dtype)
                    save_lora(
                        peft_model, job.folder, base_id(model).name, dtype, *([gate] if config.joint_gates else [])
                    )
        shutil.rmtree(group[0].work(".training"))
    if lost:
        names = ", ".join(str(job.folder) for job in lost)
        raise AdapterError(**diverged(f"adapter {names}", config))


def train_gates(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainingJob],
    *,
    config: GateConfig | None = None,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    progress: bool = True,
) -> None:
    """Train the gate of each job's adapter, several over one forward pass; see `train_gate`.

    Experts with a gate are left alone, unless it was trained for another
    adapter. A run that was killed goes on from its last checkpoint when it is
    called again.

    Args:
        model: the base model that the adapters were trained on.
        tokenizer: of the base model.
        jobs: each folder gets gate.safetensors and gate_config.json. The last
            gate is kept, as the paper does: their validation data is not used.
        config: settings, the same for all.
        text: how examples become tokens; as for the adapters.
        batching: how many at once.
        save_dtype: of the numbers on disk.
        progress: whether to show progress bars.

    Raises:
        BaseModelError: an expert does not fit the model, or it cannot train many at once.
        AdapterError: an expert's weights are missing or damaged.
        GateError: the training of some diverged (the others are finished).
        ConfigError: see `train_adapters`.
    """
    config, text = config or GateConfig(), text or TextConfig()
    experts = {job.name: Expert(job.folder) for job in jobs}
    check_sites(model, experts.values())
    finished = [has_own_gate(experts[job.name]) for job in jobs]
    run = _Run(
        model, tokenizer, config, text, batching or BatchingConfig(), gate_save_steps(config), ".gating", progress
    )
    lost: list[TrainingJob] = []
    for group, label in run.groups([replace(job, validation=()) for job in jobs], finished):
        hashes = {job.name: sha256(job.folder / WEIGHTS_FILE) for job in group}
        described = {job.name: _sources(job) | {"adapter_sha256": hashes[job.name]} for job in group}
        chosen = [experts[job.name] for job in group]
        factors = _frozen_factors(model, chosen)
        # zero: every gate starts half open (paper section 3.1)
        start = {site: torch.zeros_like(a_ERI[:, 0], dtype=torch.float32) for site, (a_ERI, _) in factors.items()}
        matrix = ExpertMatrix(start, torch.float32)
        kept_EP = run.train(group, described, matrix, partial(_gated_layers, model, factors), label)
        tensors = matrix.split(kept_EP.cpu())
        for e, (job, expert) in enumerate(zip(group, chosen, strict=True)):
            if not torch.isfinite(kept_EP[e]).all():
                lost.append(job)
            elif not has_own_gate(expert):
                vectors = {site: tensors[site][e] for site in expert.shapes}
                provenance = gate_provenance(model, described[job.name]["data"], hashes[job.name], config, text)
                save_gate(job.folder, vectors, provenance, DTYPES[save_dtype])
        shutil.rmtree(group[0].work(".gating"))
    if lost:
        names = ", ".join(str(job.folder) for job in lost)
        raise GateError(**diverged(f"the gate of {names}", config))


class _Run:
    """What adapters and gates have in common: groups, and the training of one."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: OptimizerConfig,
        text: TextConfig,
        batching: BatchingConfig,
        save_steps: int,
        suffix: str,
        progress: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.text = text
        self.batching = batching
        self.save_steps = save_steps
        self.suffix = suffix
        self.progress = progress
        self.encoder = Encoder(tokenizer, model.config, text)
        # what torchrun and accelerate say to the processes that they start
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
        if num_processes > 1:
            raise ConfigError(
                "many experts train in one process",
                found=f"{num_processes} processes",
                fix="start one process for each GPU (CUDA_VISIBLE_DEVICES), with other experts in each",
            )

    def groups(self, jobs: Sequence[TrainingJob], finished: Sequence[bool]) -> list[tuple[list[TrainingJob], str]]:
        """The groups that are still to be trained, and how a progress bar calls them."""
        check_names(jobs)
        groups = training_groups(jobs, finished, self.encoder, self.batching, self.config.batch_size, self.suffix)
        return [(group, group_label(group, i, len(groups))) for i, group in enumerate(groups, start=1)]

    def train(
        self,
        group: Sequence[TrainingJob],
        described: Mapping[str, Mapping[str, Any]],
        matrix: ExpertMatrix,
        layers: Callable[[ExpertMatrix], Mapping[str, BatchedLora]],
        label: str,
    ) -> torch.Tensor:
        """Train a group; returns what is to be kept, shape (E, P)."""
        work = group[0].work(self.suffix)
        run = describe(self.config, self.text, self.model, [])
        run |= {"data": None, "experts": described}
        was_training = self.model.training
        batched = BatchedModel(self.model, layers(matrix))
        try:
            with enough_memory(len(group)):
                data = GroupData(
                    self.encoder,
                    [job.examples for job in group],
                    [job.validation for job in group],
                    partial(self._trainer, batched, work),
                    length_multiple=self.batching.length_multiple,
                    with_mask=needs_mask(self.model),
                    equal_targets=batched.adapts_head,
                )
                trainer = GroupTrainer(
                    batched, matrix, data, self.config, work, run, progress=label if self.progress else None
                )
                with batched.compiled() if self.batching.compile else nullcontext():
                    return trainer.train()
        finally:
            batched.unwrap().train(was_training)

    def _trainer(self, model: BatchedModel, work: Path, rows: Sequence[int], validation: Sequence[int]) -> Trainer:
        return make_trainer(
            model, self.config, work, save_steps=self.save_steps, dataset=rows, validation=validation, collate=list
        )


def _sources(job: TrainingJob) -> dict[str, Any]:
    return {
        "data": fingerprint(job.examples),
        "validation": fingerprint(job.validation) if job.validation else None,
    }


def _adapter_layers(layers: Mapping[str, Any], matrix: ExpertMatrix) -> dict[str, BatchedLora]:
    """A trainable layer in the place of each of PEFT's."""
    return {
        site: BatchedLora(
            layer.get_base_layer(),
            matrix.parameters[site + ".a"],
            matrix.parameters[site + ".b"],
            scaling=layer.scaling["default"],
            gates_EI=matrix.parameters.get(site + GATE.suffix),
        )
        for site, layer in layers.items()
    }


def _zero_gates(layers: Mapping[str, Any], factors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gates for joint training; every one starts half open, as in `train_gates`."""
    return {site + GATE.suffix: torch.zeros_like(factors[site + ".a"][:, 0]) for site in layers}


def _save_joint_gate(
    model: PreTrainedModel,
    tensors: Mapping[str, torch.Tensor],
    expert: int,
    data: str,
    config: AdapterTrainingConfig,
    text: TextConfig,
    dtype: torch.dtype,
    folder: Path,
) -> None:
    vectors = {
        name.removesuffix(GATE.suffix): tensor[expert].cpu()
        for name, tensor in tensors.items()
        if name.endswith(GATE.suffix)
    }
    save_gate(folder, vectors, gate_provenance(model, data, sha256(folder / WEIGHTS_FILE), config, text), dtype)


def _frozen_factors(model: PreTrainedModel, experts: Sequence[Expert]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Site -> all experts' a_ERI and b_ERO, where and as the model computes."""
    stacks = stack_sites(experts, dtype=model.dtype)
    return {site: (stack.a_ERI.to(model.device), stack.b_ERO.to(model.device)) for site, stack in stacks.items()}


def _gated_layers(
    model: PreTrainedModel, factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]], matrix: ExpertMatrix
) -> dict[str, BatchedLora]:
    """A layer with frozen LoRAs and trainable gates in the place of each site's."""
    return {
        site: BatchedLora(model.get_submodule(site), a_ERI, b_ERO, gates_EI=matrix.parameters[site])
        for site, (a_ERI, b_ERO) in factors.items()
    }


def has_adapter(job: TrainingJob) -> bool:
    """Whether a job's adapter is finished.

    Raises:
        AdapterError: something else lies in its folder.
    """
    return job.folder.exists() and bool(Expert(job.folder))


def has_own_gate(expert: Expert) -> bool:
    """Whether a gate lies there that was trained for the expert's adapter."""
    try:
        return expert.has_gate and bool(expert.load_gate())
    except GateError:
        return False
