"""A run of transformers' Trainer that can be killed and goes on when it is started again.

Axes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from phatgoose.config import OptimizerConfig
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example
from phatgoose.training.run import goes_on


def target_loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over the labels that count; labels[t] belongs to logits[t]."""
    # Prompts are long and targets short: fp32 copies of the logits are made for the targets alone
    counts_BS = labels_BS != IGNORED
    return F.cross_entropy(logits_BSV[counts_BS].float(), labels_BS[counts_BS])


class _TargetTrainer(Trainer):
    """transformers' Trainer with `target_loss`."""

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        loss = target_loss(model(**{k: v for k, v in inputs.items() if k != "targets"}).logits, inputs["targets"])
        return (loss, {}) if return_outputs else loss


def run_trainer(
    model: nn.Module,
    encoder: Encoder,
    examples: Sequence[Example],
    config: OptimizerConfig,
    work: Path,
    run: dict[str, Any],
    *,
    save_steps: int,
    validation: Sequence[Example] = (),
) -> None:
    """Train what requires a gradient; go on from the last checkpoint in `work` if there is one.

    Args:
        model: called with input_ids, attention_mask and, if it has them,
            decoder_input_ids; gives logits.
        encoder: makes batches of examples.
        examples: training data.
        config: settings.
        work: folder of the checkpoints.
        run: everything that makes this run what it is; a run with another
            description is not gone on with.
        save_steps: steps between checkpoints.
        validation: if given, the checkpoint with the lowest loss on it is loaded at the end.

    Raises:
        ConfigError: an unfinished run with other settings lies in `work`.
    """
    checkpoint = _last_checkpoint(work, run)

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = encoder.collate(rows)
        # Under the name "labels" the model would compute a loss of its own, and
        # the Trainer would rescale ours by a count of labels that it shifts
        # or not depending on the model.
        batch["targets"] = batch.pop("labels")
        return batch

    trainer = make_trainer(
        model,
        config,
        work,
        save_steps=save_steps,
        dataset=encoder.encode_all(examples),
        validation=encoder.encode_all(validation),
        collate=collate,
    )
    trainer.train(resume_from_checkpoint=checkpoint)


def make_trainer(
    model: nn.Module,
    config: OptimizerConfig,
    work: Path,
    *,
    save_steps: int,
    dataset: Sequence[Any],
    validation: Sequence[Any],
    collate: Callable[[list[Any]], Any],
) -> Trainer:
    """transformers' Trainer with our settings and `target_loss`, on the device that `model` is on.

    Args:
        model: what is trained.
        config: settings.
        work: folder of the checkpoints.
        save_steps: steps between checkpoints, and between evaluations.
        dataset: rows to train on.
        validation: rows to choose the best checkpoint by; empty for the last one.
        collate: makes a batch of rows.
    """
    evaluates = "steps" if validation else "no"
    on_cpu = next(model.parameters()).device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(work),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="constant_with_warmup" if config.warmup_steps else "constant",
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        optim="adamw_torch",
        seed=config.seed,
        bf16=config.dtype == "bf16",
        save_steps=save_steps,
        save_total_limit=2,
        eval_strategy=evaluates,
        eval_steps=save_steps,
        load_best_model_at_end=bool(validation),
        logging_steps=max(1, config.steps // 20),
        report_to=[],
        remove_unused_columns=False,
        label_names=["targets"],
        prediction_loss_only=True,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    # One process trains on one GPU. With several in sight the Trainer would split each batch by DataParallel,
    # behind the back of batch_size; torchrun and accelerate start a process for each.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return _TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation or None,
        data_collator=collate,
    )


def _last_checkpoint(work: Path, run: dict[str, Any]) -> str | None:
    """The checkpoint to go on from; None for a new run, whose description is written down."""
    if not goes_on(work, run):
        return None
    # From a checkpoint of the last step the Trainer would train one batch too many:
    # it looks for the end only after a batch. The last stretch is repeated instead.
    whole = [folder for folder in work.glob("checkpoint-*") if _is_whole(folder) and _step(folder) < run["steps"]]
    return str(max(whole, key=_step)) if whole else None


def _step(checkpoint: Path) -> int:
    """The optimiser step that a checkpoint's name says."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_whole(checkpoint: Path) -> bool:
    """Whether the Trainer finished a checkpoint; its state is the last file that it writes."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
