"""The run that trains the gates of many adapters (paper section 3.1).

Axes: E experts, P values of each expert, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import BatchingConfig, Dtype, GateConfig, TextConfig
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.stack import stack_sites
from phatgoose.experts.vectors import save_gate
from phatgoose.files import sha256
from phatgoose.models.base import DTYPES
from phatgoose.training.group.jobs import TrainingJob, has_own_gate
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora
from phatgoose.training.group.run import Group, GroupRun
from phatgoose.training.run import GATE_WORK, gate_provenance, gate_save_steps


class GateRun(GroupRun):
    """Trains and saves the gate of each job's adapter; see `GroupRun`.

    Args:
        config: settings, the same for all gates.
        save_dtype: dtype of the saved tensors.
    """

    suffix = GATE_WORK

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: GateConfig,
        text: TextConfig | None = None,
        batching: BatchingConfig | None = None,
        *,
        save_dtype: Dtype = "fp32",
        progress: bool = True,
    ) -> None:
        super().__init__(
            model, tokenizer, config, text, batching, save_steps=gate_save_steps(config), progress=progress
        )
        self.save_dtype = DTYPES[save_dtype]

    def is_finished(self, job: TrainingJob) -> bool:
        """Whether the job's expert has a gate that was trained for its adapter."""
        return has_own_gate(job)

    def describe_job(self, job: TrainingJob) -> dict[str, Any]:
        """The job's data and adapter."""
        return super().describe_job(job) | {"adapter_sha256": sha256(job.folder / WEIGHTS_FILE)}

    def train_group(self, group: Group) -> list[TrainingJob]:
        """See `GroupRun.train_group`."""
        stacks = stack_sites([Expert(job.folder) for job in group.jobs], dtype=self.model.dtype)
        factors = {
            site: (stack.a_ERI.to(self.model.device), stack.b_ERO.to(self.model.device))
            for site, stack in stacks.items()
        }
        # Zero: every gate starts half open (paper section 3.1)
        zeros = {site: torch.zeros_like(a_ERI[:, 0], dtype=torch.float32) for site, (a_ERI, _) in factors.items()}
        matrix = ExpertMatrix(zeros, torch.float32)
        layers = {
            site: BatchedLora(self.model.get_submodule(site), a_ERI, b_ERO, gates_EI=matrix.parameters[site])
            for site, (a_ERI, b_ERO) in factors.items()
        }
        kept_EP = self.fit(group, matrix, layers).cpu()
        return self.save_finite(group, matrix, kept_EP, partial(self.save, group))

    def save(self, group: Group, job: TrainingJob, values: Mapping[str, torch.Tensor]) -> None:
        """Save a gate of a group, given its v by site; sites that the expert does not adapt are left out."""
        vectors = {site: values[site] for site in Expert(job.folder).shapes}
        described = group.described[job.name]
        provenance = gate_provenance(self.model, described["data"], described["adapter_sha256"], self.config, self.text)
        save_gate(job.folder, vectors, provenance, self.save_dtype)
