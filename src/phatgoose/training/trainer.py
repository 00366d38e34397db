"""transformers' Trainer with this package's loss and settings.

`run_trainer` trains one adapter or gate. A killed run resumes there, from the
`last_checkpoint` of its work folder (phatgoose.training.run says which folder).

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
from phatgoose.training.run import resumes


def target_loss(logits_BSV: torch.Tensor, labels_BS: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy (nats) over the labels that are not IGNORED; labels[t] is what logits[t] should predict."""
    # Prompts are long and targets short: only the targets' logits are copied to fp32
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
    """Train every parameter that requires a gradient, from the last checkpoint in `work` if there is one.

    Args:
        model: takes input_ids, attention_mask and, for an encoder-decoder model,
            decoder_input_ids; returns logits.
        encoder: turns examples into batches.
        examples: training data.
        config: settings.
        work: folder of the checkpoints.
        run: description of the run (`describe`); only a run with the same one is resumed.
        save_steps: steps between checkpoints.
        validation: if given, the checkpoint with the lowest loss on it is loaded at the end.

    Raises:
        ConfigError: `work` holds an unfinished run with other settings.
    """
    checkpoint = last_checkpoint(work, config.steps) if resumes(work, run) else None

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = encoder.collate(rows)
        # Under the name "labels" the model would compute its own loss, and the Trainer
        # would rescale this one by a count of labels that is shifted for some models only
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
    """transformers' Trainer with the settings of `config` and `target_loss`, on the device of `model`.

    Args:
        model: the model to train.
        config: settings.
        work: folder of the checkpoints.
        save_steps: steps between checkpoints, and between evaluations.
        dataset: rows to train on.
        validation: rows to choose the best checkpoint by; if empty, the last one is kept.
        collate: turns rows into a batch.
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
    # One process trains on one GPU: with several visible, the Trainer would split each batch by DataParallel
    # and batch_size would mean something else. torchrun and accelerate start a process for each GPU.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return _TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=dataset,
        eval_dataset=validation or None,
        data_collator=collate,
    )


def last_checkpoint(work: Path, steps: int) -> str | None:
    """The newest complete checkpoint before the last of `steps`; None if there is none.

    From a checkpoint of the last step the Trainer would train one batch too many,
    because it looks for the end only after a batch. The last stretch is repeated instead.
    """
    complete = [folder for folder in work.glob("checkpoint-*") if _is_complete(folder) and _step(folder) < steps]
    return str(max(complete, key=_step)) if complete else None


def _step(checkpoint: Path) -> int:
    """The optimiser step in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def _is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer finished writing a checkpoint; its state is the last file of one."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    return True
