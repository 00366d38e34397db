"""The training loop of a group of experts.

A killed run resumes when `GroupTrainer` is created, from the checkpoint in its work
folder (phatgoose.training.run says which folder).

The loss is the sum of the experts' own losses, so no expert's gradient depends on
another, and AdamW treats every value separately. So each expert ends where
transformers' Trainer would take it alone: the Trainer's settings, order of data and
schedule of checkpoints are used here too.

Axes: E experts, P values of each expert.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, get_constant_schedule_with_warmup
from transformers.trainer_callback import DefaultFlowCallback

from phatgoose.config import OptimizerConfig
from phatgoose.errors import ConfigError
from phatgoose.files import replacing
from phatgoose.training.group.batch import Batch
from phatgoose.training.group.data import GroupData
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedModel
from phatgoose.training.run import resumes

CHECKPOINT_FILE = "checkpoint.safetensors"


class GroupTrainer:
    """Trains the experts of a group. Creating it loads the checkpoint of a run that was killed.

    Args:
        model: the base model with the parameters of `matrix` in its layers.
        matrix: the values to train.
        data: the experts' batches.
        config: settings.
        work: folder of the checkpoint.
        run: description of the run (`describe`); only a run with the same one is resumed.
        progress: label of the progress bar; None for none.

    Raises:
        ConfigError: `work` holds an unfinished run with other settings, or its checkpoint is damaged.
    """

    def __init__(
        self,
        model: BatchedModel,
        matrix: ExpertMatrix,
        data: GroupData,
        config: OptimizerConfig,
        work: Path,
        run: dict[str, Any],
        *,
        progress: str | None = None,
    ) -> None:
        self.model = model
        self.matrix = matrix
        self.data = data
        self.config = config
        self.work = work
        self._progress = progress
        self._device = matrix.master_EP.device
        arguments = data.trainers[0].args
        self._optimizer = torch.optim.AdamW(
            [matrix.master_EP],
            lr=config.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=config.weight_decay,
        )
        self._step = 0
        self._best_EP = matrix.master_EP.detach().clone()
        self._best_losses_E = torch.full((len(matrix.master_EP),), torch.inf, device=self._device)
        if resumes(work, run):
            self._load()
        for group in self._optimizer.param_groups:
            group["initial_lr"] = config.learning_rate
        self._schedule = get_constant_schedule_with_warmup(
            self._optimizer, config.warmup_steps, last_epoch=self._step - 1
        )

    def train(self) -> torch.Tensor:
        """Train to the last step.

        Returns:
            kept_EP: the values of an expert's best checkpoint if it has validation
            data, else its last values.
        """
        hidden = self._progress is None
        self._log("resumes at" if self._step else "begins at")
        with tqdm(total=self.config.steps, initial=self._step, desc=self._progress, disable=hidden, unit="step") as bar:
            for batches in self.data.steps(self._step):
                losses_E = self.step(batches)
                bar.update()
                due = self._due()
                if due.should_log and not hidden:
                    bar.set_postfix(loss=f"{losses_E.mean().item():.4f}")
                if due.should_evaluate:
                    self._keep_best(self.evaluate())
                if due.should_save:
                    self._save()
        self._log("ended at")
        is_best_E1 = torch.isfinite(self._best_losses_E).unsqueeze(1)
        return torch.where(is_best_E1, self._best_EP, self.matrix.master_EP.detach())

    def step(self, batches: Sequence[Batch]) -> torch.Tensor:
        """Take one optimiser step; returns each expert's loss in it (nats per target token), shape (E,)."""
        self.model.train()
        losses_E = torch.zeros(len(self.matrix.master_EP), device=self._device)
        for batch in batches:
            losses_E += self._backward(batch.to(self._device))
        self.matrix.clip_gradients(self.config.clip)
        self._optimizer.step()
        self._schedule.step()
        self.matrix.finish_step()
        self._step += 1
        return losses_E

    def _log(self, verb: str) -> None:
        logging.getLogger(__name__).info("%s %s step %d of %d", self.work.name, verb, self._step, self.config.steps)

    def _backward(self, batch: Batch) -> torch.Tensor:
        """Add the gradients of one batch; returns its part of each expert's loss, shape (E,)."""
        with self._autocast():
            losses_E: torch.Tensor = self.model(batch)
        losses_E.sum().backward()
        self.matrix.take_gradients()
        return losses_E.detach()

    @torch.no_grad()
    def evaluate(self) -> torch.Tensor:
        """Each expert's validation loss, shape (E,); NaN for an expert without validation rows.

        As in the Trainer, it is the mean over rows of the loss of each row's batch.
        """
        self.model.eval()
        sums_E = torch.zeros(len(self.matrix.master_EP), device=self._device)
        num_rows_E = torch.zeros_like(sums_E)
        for batch, rows_E in self.data.evaluation():
            with self._autocast():
                losses_E = self.model(batch.to(self._device))
            rows_E = rows_E.to(self._device)
            sums_E += torch.where(rows_E > 0, losses_E * rows_E, 0)
            num_rows_E += rows_E
        return sums_E / num_rows_E

    def _due(self) -> TrainerControl:
        """Whether the Trainer would log, evaluate and save after this step."""
        arguments = next((t.args for t in self.data.trainers if t.eval_dataset is not None), self.data.trainers[0].args)
        state = TrainerState(global_step=self._step, max_steps=self.config.steps)
        state.compute_steps(arguments, self.config.steps)
        return DefaultFlowCallback().on_step_end(arguments, state, TrainerControl())

    def _keep_best(self, losses_E: torch.Tensor) -> None:
        better_E = losses_E < self._best_losses_E
        self._best_losses_E = torch.where(better_E, losses_E, self._best_losses_E)
        self._best_EP = torch.where(better_E.unsqueeze(1), self.matrix.master_EP.detach(), self._best_EP)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self.config.dtype == "bf16")

    def _save(self) -> None:
        adam = self._optimizer.state[self.matrix.master_EP]
        tensors = {
            "master_EP": self.matrix.master_EP.detach(),
            "exp_avg_EP": adam["exp_avg"],
            "exp_avg_sq_EP": adam["exp_avg_sq"],
            "best_EP": self._best_EP,
            "best_losses_E": self._best_losses_E,
            "random_state": torch.get_rng_state(),
            "step": torch.tensor(self._step),
        }
        if self._device.type == "cuda":
            tensors["cuda_random_state"] = torch.cuda.get_rng_state(self._device)
        with replacing(self._checkpoint) as temporary:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, temporary)

    def _load(self) -> None:
        if not self._checkpoint.is_file():
            return
        try:
            tensors = load_file(self._checkpoint, device=str(self._device))
        except SafetensorError as error:
            raise ConfigError(
                f"cannot read {self._checkpoint}",
                found=str(error),
                expected="a complete safetensors file",
                fix=f"delete {self.work} to start over",
            ) from error
        self._step = int(tensors["step"])
        self.matrix.master_EP.data.copy_(tensors["master_EP"])
        self.matrix.finish_step()
        self._optimizer.state[self.matrix.master_EP] = {
            "step": torch.tensor(float(self._step)),
            "exp_avg": tensors["exp_avg_EP"],
            "exp_avg_sq": tensors["exp_avg_sq_EP"],
        }
        self._best_EP, self._best_losses_E = tensors["best_EP"], tensors["best_losses_E"]
        torch.set_rng_state(tensors["random_state"].cpu())
        if "cuda_random_state" in tensors and self._device.type == "cuda":
            torch.cuda.set_rng_state(tensors["cuda_random_state"].cpu(), self._device)

    @property
    def _checkpoint(self) -> Path:
        return self.work / CHECKPOINT_FILE


@contextmanager
def enough_memory(num_experts: int) -> Iterator[None]:
    """Turn torch's OutOfMemoryError into a ConfigError."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"{num_experts} experts at once need more memory than the device has",
            found=str(error).splitlines()[0],
            fix="a smaller --experts-at-once or --batch-size",
        ) from error
