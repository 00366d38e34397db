"""The run that trains many LoRA adapters, with PEFT's initial values and format.

Axes: E experts, P values of each expert, I in-features, O out-features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, TextConfig
from phatgoose.models.base import DTYPES, base_id
from phatgoose.training.group.jobs import TrainingJob, has_adapter
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora
from phatgoose.training.group.run import Group, GroupRun
from phatgoose.training.lora import initial_factors, load_factors, lora_layers, new_lora, save_lora
from phatgoose.training.run import ADAPTER_WORK


class AdapterRun(GroupRun):
    """Trains and saves an adapter for each job; see `GroupRun`.

    Args:
        config: settings, the same for all adapters.
        save_dtype: dtype of the saved tensors.
    """

    suffix = ADAPTER_WORK
    config: AdapterTrainingConfig

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: AdapterTrainingConfig,
        text: TextConfig | None = None,
        batching: BatchingConfig | None = None,
        *,
        save_dtype: Dtype = "fp32",
        progress: bool = True,
    ) -> None:
        super().__init__(model, tokenizer, config, text, batching, save_steps=config.save_steps, progress=progress)
        self.save_dtype = DTYPES[save_dtype]

    def is_finished(self, job: TrainingJob) -> bool:
        """Whether the job's adapter is in place."""
        return has_adapter(job)

    def train_group(self, group: Group) -> list[TrainingJob]:
        """See `GroupRun.train_group`."""
        with new_lora(self.model, self.config) as peft_model:
            layers = lora_layers(peft_model)
            matrix = ExpertMatrix(self.initial(layers, len(group.jobs)), DTYPES[self.config.dtype])
            kept_EP = self.fit(group, matrix, self.batched_layers(layers, matrix))
            return self.save_finite(group, matrix, kept_EP, partial(self.save, group, peft_model))

    def initial(self, layers: Mapping[str, Any], num_experts: int) -> dict[str, torch.Tensor]:
        """Initial values by name, shape (E, ...); see `initial_factors`."""
        return initial_factors(layers, num_experts)

    def batched_layers(self, layers: Mapping[str, Any], matrix: ExpertMatrix) -> dict[str, BatchedLora]:
        """Site -> the layer that takes the place of PEFT's, with parameters of `matrix`."""
        return {
            site: BatchedLora(
                layer.get_base_layer(),
                matrix.parameters[site + ".a"],
                matrix.parameters[site + ".b"],
                scaling=layer.scaling["default"],
            )
            for site, layer in layers.items()
        }

    def save(self, group: Group, peft_model: PeftModel, job: TrainingJob, values: Mapping[str, torch.Tensor]) -> None:
        """Save an adapter of a group, given its values by name."""
        load_factors(lora_layers(peft_model), values)
        save_lora(peft_model, job.folder, base_id(self.model).name, self.save_dtype)
