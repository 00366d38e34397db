"""A run over many experts, group by group: what adapters and gates have in common.

Axes: E experts, P values of each expert.
"""

from __future__ import annotations

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer

from phatgoose.config import BatchingConfig, OptimizerConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import ConfigError
from phatgoose.training.group.data import GroupData
from phatgoose.training.group.jobs import TrainingJob, check_names
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora, BatchedModel, needs_mask
from phatgoose.training.group.plan import group_label, training_groups
from phatgoose.training.group.trainer import GroupTrainer, enough_memory
from phatgoose.training.run import describe, describe_data
from phatgoose.training.trainer import make_trainer


@dataclass(frozen=True, kw_only=True)
class Group:
    """Experts that train together.

    Attributes:
        jobs: the experts' jobs; the first one leads.
        described: expert's name -> everything of its job that determines its result.
        label: label of the progress bar.
        work: work folder.
    """

    jobs: Sequence[TrainingJob]
    described: Mapping[str, Mapping[str, Any]]
    label: str
    work: Path


class GroupRun(ABC):
    """Trains the experts of many jobs in groups, each group over one forward pass.

    A subclass says what is trained of an expert and how that is saved.

    Args:
        model: the base model; its weights are not changed.
        tokenizer: the base model's tokenizer.
        config: settings, the same for all experts.
        text: how examples become tokens.
        batching: how many experts train at once.
        save_steps: steps between checkpoints.
        progress: whether to show progress bars.

    Raises:
        ConfigError: this is one of several processes.
    """

    suffix: ClassVar[str]  # of the work folders' names

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        config: OptimizerConfig,
        text: TextConfig | None = None,
        batching: BatchingConfig | None = None,
        *,
        save_steps: int,
        progress: bool = True,
    ) -> None:
        _check_one_process()
        self.model = model
        self.config = config
        self.text = text or TextConfig()
        self.batching = batching or BatchingConfig()
        self.save_steps = save_steps
        self.progress = progress
        self.encoder = Encoder(tokenizer, model.config, self.text)

    @abstractmethod
    def is_finished(self, job: TrainingJob) -> bool:
        """Whether a job's result is in place."""

    @abstractmethod
    def train_group(self, group: Group) -> list[TrainingJob]:
        """Train the experts of a group (`fit`) and save them (`save_finite`); returns those that diverged."""

    def describe_job(self, job: TrainingJob) -> dict[str, Any]:
        """Everything of a job that determines its result."""
        return {**describe_data(job.examples, job.validation)}

    def describe_run(self, group: Group) -> dict[str, Any]:
        """Description of a group's run (`phatgoose.training.run.describe`)."""
        return describe(self.config, self.text, self.model, data=None, validation=None, experts=group.described)

    def train_all(self, jobs: Sequence[TrainingJob]) -> list[TrainingJob]:
        """Train all jobs that are not finished, interrupted groups first; returns those that diverged."""
        finished = [self.is_finished(job) for job in jobs]
        check_names(jobs)
        groups = training_groups(jobs, finished, self.encoder, self.batching, self.config.batch_size, self.suffix)
        lost = []
        for number, members in enumerate(groups, start=1):
            group = Group(
                jobs=members,
                described={job.name: self.describe_job(job) for job in members},
                label=group_label(members, number, len(groups)),
                work=members[0].work(self.suffix),
            )
            lost += self.train_group(group)
            shutil.rmtree(group.work)
        return lost

    def fit(self, group: Group, matrix: ExpertMatrix, layers: Mapping[str, BatchedLora]) -> torch.Tensor:
        """Train a group, or resume it.

        Args:
            group: the experts.
            matrix: the values to train.
            layers: site -> the layer to put there, with parameters of `matrix`.

        Returns:
            kept_EP: the values to save, each expert's best or last ones.
        """
        was_training = self.model.training
        batched = BatchedModel(self.model, layers)
        try:
            with enough_memory(len(group.jobs)):
                trainer = self._trainer(group, matrix, batched)
                with batched.compiled() if self.batching.compile else nullcontext():
                    return trainer.train()
        finally:
            batched.unwrap().train(was_training)

    def save_finite(
        self,
        group: Group,
        matrix: ExpertMatrix,
        kept_EP: torch.Tensor,
        save: Callable[[TrainingJob, dict[str, torch.Tensor]], None],
    ) -> list[TrainingJob]:
        """Save the experts of a group that are not finished.

        Args:
            group: the experts.
            matrix: knows the names and shapes of the values.
            kept_EP: the values to save, from `fit`.
            save: saves an expert, given its own values by name.

        Returns:
            The jobs whose values are not finite, which are not saved.
        """
        lost, tensors = [], matrix.split(kept_EP)
        for e, job in enumerate(group.jobs):
            if not torch.isfinite(kept_EP[e]).all():
                lost.append(job)
            elif not self.is_finished(job):
                save(job, {name: tensor[e] for name, tensor in tensors.items()})
        return lost

    def _trainer(self, group: Group, matrix: ExpertMatrix, batched: BatchedModel) -> GroupTrainer:
        def make_single(rows: Sequence[int], validation: Sequence[int]) -> Trainer:
            return make_trainer(
                batched,
                self.config,
                group.work,
                save_steps=self.save_steps,
                dataset=rows,
                validation=validation,
                collate=list,
            )

        data = GroupData(
            self.encoder,
            [job.examples for job in group.jobs],
            [job.validation for job in group.jobs],
            make_single,
            length_multiple=self.batching.length_multiple,
            with_mask=needs_mask(self.model),
            equal_targets=batched.adapts_head,
        )
        return GroupTrainer(
            batched,
            matrix,
            data,
            self.config,
            group.work,
            self.describe_run(group),
            progress=group.label if self.progress else None,
        )


def _check_one_process() -> None:
    # torchrun and accelerate set it for the processes that they start
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes > 1:
        raise ConfigError(
            "many experts train in one process",
            found=f"{num_processes} processes",
            fix="start one process for each GPU (CUDA_VISIBLE_DEVICES), with other experts in each",
        )
