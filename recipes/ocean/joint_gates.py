"""Adapters and gates that are trained together: the paper's ablation (appendix A), for comparison, not for use.

    python recipes/ocean --stages train variants --pools joint --data DATA --out OUT

Everything but the layer is as in `train_adapters`:

    y = W u + scaling * B A u * sigmoid(v . u)      with B, A and v trained, v = 0 at the start

Axes: E experts, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, TextConfig
from phatgoose.errors import AdapterError
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.vectors import save_gate
from phatgoose.files import sha256
from phatgoose.training.group.adapters import AdapterRun
from phatgoose.training.group.jobs import TrainingJob, has_own_gate
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora
from phatgoose.training.group.run import Group
from phatgoose.training.run import diverged, gate_provenance

JOINT_GATES = {"joint_gates": True}
GATE = ".gate"


class JointRun(AdapterRun):
    """Trains and saves an adapter with its gate for each job; see `AdapterRun`."""

    def is_finished(self, job: TrainingJob) -> bool:
        """Whether the job's adapter and gate are in place."""
        return super().is_finished(job) and has_own_gate(job)

    def describe_run(self, group: Group) -> dict[str, Any]:
        """See `GroupRun.describe_run`; a run without joint gates is another run."""
        return super().describe_run(group) | JOINT_GATES

    def initial(self, layers: Mapping[str, Any], num_experts: int) -> dict[str, torch.Tensor]:
        """PEFT's initial values, and gates that start half open, as in `train_gates`."""
        factors = super().initial(layers, num_experts)
        return factors | {site + GATE: torch.zeros_like(factors[site + ".a"][:, 0]) for site in layers}

    def batched_layers(self, layers: Mapping[str, Any], matrix: ExpertMatrix) -> dict[str, BatchedLora]:
        """Those of `AdapterRun`, with gates."""
        batched = super().batched_layers(layers, matrix)
        for site, layer in batched.items():
            layer.gates_EI = matrix.parameters[site + GATE]
        return batched

    def save(self, group: Group, peft_model: PeftModel, job: TrainingJob, values: Mapping[str, torch.Tensor]) -> None:
        """Save an adapter and its gate. A run that was killed between them has left the adapter."""
        if not job.folder.exists():
            super().save(group, peft_model, job, values)
        vectors = {name.removesuffix(GATE): v_I.cpu() for name, v_I in values.items() if name.endswith(GATE)}
        provenance = gate_provenance(
            self.model, group.described[job.name]["data"], sha256(job.folder / WEIGHTS_FILE), self.config, self.text
        )
        settings = {"training": provenance.settings["training"] | JOINT_GATES, "text": provenance.settings["text"]}
        save_gate(job.folder, vectors, replace(provenance, settings=settings), self.save_dtype)


def train_jointly(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    jobs: Sequence[TrainingJob],
    *,
    config: AdapterTrainingConfig,
    text: TextConfig | None = None,
    batching: BatchingConfig | None = None,
    save_dtype: Dtype = "fp32",
    progress: bool = True,
) -> None:
    """`train_adapters`, with a gate in each adapter's folder that was trained together with it."""
    run = JointRun(model, tokenizer, config, text, batching, save_dtype=save_dtype, progress=progress)
    if lost := run.train_all(jobs):
        raise AdapterError(**diverged(f"adapter {', '.join(str(job.folder) for job in lost)}", config))
