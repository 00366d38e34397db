"""Training an adapter, and then its gate, with PEFT and transformers' Trainer.

Both keep their checkpoints in a work folder beside the result. A run that was
killed and is started again with the same settings goes on from the last one;
the result appears in one step at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME

from phatgoose import __version__
from phatgoose.adapter import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.base import DTYPES, base_id, base_source
from phatgoose.config import AdapterTrainingConfig, Dtype, GateConfig, OptimizerConfig, TextConfig
from phatgoose.data import IGNORED, Encoder, Example, fingerprint
from phatgoose.errors import AdapterError, ConfigError
from phatgoose.expert import Expert
from phatgoose.files import new_folder, replacing, sha256, write_json
from phatgoose.gate import GateProvenance, save_gate
from phatgoose.gated import GatedModel

_RUN_FILE = "run.json"


def train_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    out: str | Path,
    *,
    config: AdapterTrainingConfig | None = None,
    text: TextConfig | None = None,
    validation: Sequence[Example] = (),
    save_dtype: Dtype = "fp32",
) -> Path:
    """Train a LoRA adapter on the frozen `model` and save it as PEFT does.

    The loss is the mean cross-entropy over target tokens (with accumulation:
    the mean of the forward passes' means, as in the official code).

    Args:
        model: the base model; its weights are not changed.
        tokenizer: of the base model.
        examples: training data.
        out: folder to make. `<out>.training` holds the checkpoints meanwhile.
        config: settings.
        text: how examples become tokens.
        validation: if given, the checkpoint with the lowest loss on it is kept.
        save_dtype: of the numbers on disk.

    Returns:
        `out`.

    Raises:
        AdapterError: `out` exists already.
        ConfigError: an unfinished run with other settings lies in the work folder.
    """
    from peft import LoraConfig, get_peft_model

    config, text, out = config or AdapterTrainingConfig(), text or TextConfig(), Path(out)
    if out.exists():
        raise AdapterError(
            f"{out} exists already", expected="a new folder", fix="choose another --out, or delete it first"
        )
    encoder = Encoder(tokenizer, model.config, text)
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
        raise ConfigError("PEFT cannot adapt this base model so", found=str(error).splitlines()[0]) from error
    # PEFT looks the base up whenever it saves a checkpoint: let it find an embedded one on this machine
    peft_model.peft_config["default"].base_model_name_or_path = base_source(base_id(model).name)
    work = out.with_name(out.name + ".training")
    run = _describe(config, text, model, examples, validation)
    try:
        _run_trainer(
            peft_model, encoder, examples, config, work, run, save_steps=config.save_steps, validation=validation
        )
        if _is_main_process():
            with new_folder(out) as temporary:
                _save_adapter(peft_model, temporary, base_id(model).name, DTYPES[save_dtype])
            shutil.rmtree(work)
    finally:
        peft_model.unload()
    return out


def train_gate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    expert: Expert,
    examples: Sequence[Example],
    *,
    config: GateConfig | None = None,
    text: TextConfig | None = None,
    save_dtype: Dtype = "fp32",
) -> dict[str, torch.Tensor]:
    """Train an expert's gate with everything else frozen, and write it into the expert's folder.

    Paper section 3.1; see `phatgoose.gated`. Base and adapter stay bit-identical.

    Args:
        model: the base model that the expert's adapter was trained on.
        tokenizer: of the base model.
        expert: its folder gets gate.safetensors and gate_config.json.
        examples: the data that the adapter was trained on.
        config: settings.
        text: how examples become tokens; as for the adapter.
        save_dtype: of the numbers on disk.

    Returns:
        Site -> v, shape (in-features,), fp32.

    Raises:
        BaseModelError: the expert does not fit the model.
        AdapterError: the expert's weights are damaged.
    """
    config, text = config or GateConfig(), text or TextConfig()
    encoder = Encoder(tokenizer, model.config, text)
    base = base_id(model)
    run = _describe(config, text, model, examples)
    run["adapter_sha256"] = sha256(expert.folder / WEIGHTS_FILE)
    gated = GatedModel(model, expert)
    work = expert.folder.with_name(expert.folder.name + ".gating")
    try:
        _run_trainer(gated, encoder, examples, config, work, run, save_steps=max(1, config.steps // 4))
        vectors = {site: v.detach().cpu() for site, v in gated.gates().items()}
    finally:
        gated.unwrap()
    if _is_main_process():
        provenance = GateProvenance(
            base=base.name,
            revision=base.revision,
            data=run["data"],
            adapter_sha256=run["adapter_sha256"],
            steps=config.steps,
            learning_rate=config.learning_rate,
            seed=config.seed,
            settings={"training": asdict(config), "text": asdict(text)},
            phatgoose=__version__,
        )
        save_gate(expert.folder, vectors, provenance, DTYPES[save_dtype])
        shutil.rmtree(work)
    return vectors


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


def _run_trainer(
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
    """Train what requires a gradient; go on from the last checkpoint in `work` if there is one."""
    checkpoint = _last_checkpoint(work, run)
    evaluates = "steps" if validation else "no"
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
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )

    def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = encoder.collate(rows)
        # Under the name "labels" the model would compute a loss of its own, and
        # the Trainer would rescale ours by a count of labels that it shifts
        # or not depending on the model.
        batch["targets"] = batch.pop("labels")
        return batch

    trainer = _TargetTrainer(
        model=model,
        args=arguments,
        train_dataset=[encoder.encode(example) for example in examples],
        eval_dataset=[encoder.encode(example) for example in validation] or None,
        data_collator=collate,
    )
    trainer.train(resume_from_checkpoint=checkpoint)


def _last_checkpoint(work: Path, run: dict[str, Any]) -> str | None:
    """The checkpoint to go on from; None for a new run, whose description is written down."""
    path = work / _RUN_FILE
    if path.is_file():
        old = json.loads(path.read_text(encoding="utf-8"))
        different = sorted(key for key in old.keys() | run.keys() if old.get(key) != run.get(key))
        if different:
            raise ConfigError(
                f"{work} holds an unfinished run with other settings",
                found=f"{different[0]}: {old.get(different[0])!r}",
                expected=f"{run.get(different[0])!r}",
                fix=f"use the old settings to go on, or delete {work} to begin anew",
            )
        # From a checkpoint of the last step the Trainer would train one batch too many:
        # it looks for the end only after a batch. The last stretch is repeated instead.
        whole = [folder for folder in work.glob("checkpoint-*") if _is_whole(folder) and _step(folder) < run["steps"]]
        return str(max(whole, key=_step)) if whole else None
    work.mkdir(parents=True, exist_ok=True)
    write_json(path, run)
    return None


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


def _describe(
    config: OptimizerConfig,
    text: TextConfig,
    model: PreTrainedModel,
    examples: Sequence[Example],
    validation: Sequence[Example] = (),
) -> dict[str, Any]:
    return {
        **asdict(config),
        **asdict(text),
        "base": str(base_id(model)),
        "data": fingerprint(examples),
        "validation": fingerprint(validation) if validation else None,
    }


def _save_adapter(peft_model: Any, folder: Path, base: str, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    peft_model.save_pretrained(str(folder))
    weights = {name: t.to(dtype) for name, t in load_file(folder / WEIGHTS_FILE).items()}
    with replacing(folder / WEIGHTS_FILE) as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    write_json(folder / CONFIG_FILE, config)


def _is_main_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
