"""phatgoose train, phatgoose gate and phatgoose train-many."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Literal

import typer

from phatgoose.cli.config_options import Fields, config_options
from phatgoose.cli.options import (
    AdapterBase,
    AdapterData,
    AdapterFolder,
    Device,
    Revision,
    SaveDtype,
    Split,
    TrainedBase,
    ValidationSplit,
)
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, GateConfig, RayConfig, TextConfig
from phatgoose.errors import ConfigError

Cluster = Annotated[RayConfig, Fields(address="ray_address", num_gpus="ray_gpus", num_cpus="ray_cpus")]


@config_options
def train(
    *,
    data: Annotated[
        list[str],
        typer.Argument(
            help="A .jsonl or .jsonl.gz file with input and target, or a dataset's name; several train on their union."
        ),
    ],
    base: TrainedBase,
    out: Annotated[Path, typer.Option(help="Folder of the new adapter.")],
    revision: Revision = None,
    split: Split = "train",
    validation_split: ValidationSplit = None,
    config: AdapterTrainingConfig,
    save_dtype: SaveDtype = "fp32",
    text: TextConfig,
    device: Device = None,
) -> None:
    """Train a LoRA adapter on a frozen base model.

    A killed run resumes from its last checkpoint when the same command is given again.
    """
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
        load_base(base, revision, dtype=config.dtype, device=device),
        load_tokenizer(base, revision),
        examples,
        out,
        config=config,
        text=text,
        validation=validation,
        save_dtype=save_dtype,
    )
    typer.echo(f"adapter: {out}")
    if len(data) == 1:  # an adapter of several datasets is the paper's Multitask, which has no gate
        typer.echo(f"next: phatgoose gate {out} --data {data[0]}")


@config_options
def gate(
    *,
    adapter: AdapterFolder,
    data: AdapterData,
    base: AdapterBase = None,
    revision: Revision = None,
    split: Split = "train",
    config: GateConfig,
    save_dtype: SaveDtype = "fp32",
    text: TextConfig,
    device: Device = None,
) -> None:
    """Train the gate of a finished adapter: one vector per adapted layer, everything else frozen."""
    from phatgoose.data.examples import read_examples
    from phatgoose.experts.checks import base_of
    from phatgoose.experts.location import editing, open_expert
    from phatgoose.models.base import load_base, load_tokenizer
    from phatgoose.training.single import train_gate

    wanted = base_of(open_expert(adapter), base, revision)
    examples = read_examples(data, split)
    model = load_base(wanted.name, wanted.revision, dtype=config.dtype, device=device)
    tokenizer = load_tokenizer(wanted.name, wanted.revision)
    with editing(adapter) as expert:
        train_gate(model, tokenizer, expert, examples, config=config, text=text, save_dtype=save_dtype)
    typer.echo(f"gate: {adapter / 'gate.safetensors'}")


@config_options
def train_many(
    *,
    data: Annotated[
        list[Path], typer.Argument(help="A .jsonl or .jsonl.gz file for each expert, which is named after it.")
    ],
    base: TrainedBase,
    out: Annotated[Path, typer.Option(help="Folder in which each expert gets a folder.")],
    revision: Revision = None,
    split: Split = "train",
    validation_split: ValidationSplit = None,
    gates: Annotated[bool, typer.Option(help="Train the gates after the adapters.")] = True,
    joint_gates: Annotated[bool, typer.Option("--joint-gates", hidden=True)] = False,
    batching: BatchingConfig,
    config: AdapterTrainingConfig,
    gate_steps: Annotated[int, typer.Option(help="Optimiser steps of each gate.")] = GateConfig.steps,
    gate_learning_rate: Annotated[
        float, typer.Option(help="Peak learning rate of AdamW for the gates.")
    ] = GateConfig.learning_rate,
    save_dtype: SaveDtype = "fp32",
    text: TextConfig,
    device: Device = None,
    executor: Annotated[
        Literal["local", "ray"], typer.Option(help="Train in this process, or on the machines of a Ray cluster.")
    ] = "local",
    cluster: Cluster,
) -> None:
    """Train an adapter, and then its gate, for each of many data files, several experts over one forward pass.

    Each expert turns out as if it had been trained alone. When the same command is given again, finished experts are
    left as they are, and a killed run resumes from its last checkpoint.
    """
    if joint_gates:
        raise ConfigError(
            "train-many trains gates after their adapters",
            found="--joint-gates",
            expected="no such flag; joint training is an ablation of the paper (appendix A), in recipes/ocean",
            fix="python recipes/ocean --stages train variants --pools joint --data DATA --out OUT",
        )
    shared = {field.name: getattr(config, field.name) for field in fields(GateConfig)}
    gate_config = GateConfig(**shared | {"steps": gate_steps, "learning_rate": gate_learning_rate})
    if executor == "local" and cluster != RayConfig():
        raise ConfigError("options of a Ray cluster, but no cluster", found="--executor local", fix="--executor ray")

    if executor == "ray":
        from phatgoose.training.cluster.executor import train_on_ray

        folders = train_on_ray(
            data, out, base, revision, config=config, gate_config=gate_config, gates=gates, text=text,
            batching=batching, save_dtype=save_dtype, split=split, validation_split=validation_split, device=device,
            cluster=cluster,
        )  # fmt: skip
    else:
        from phatgoose.models.base import load_base, load_tokenizer
        from phatgoose.training.group.jobs import read_jobs
        from phatgoose.training.group.train import train_adapters, train_gates

        jobs = read_jobs(data, out, split, validation_split)
        model = load_base(base, revision, dtype=config.dtype, device=device)
        tokenizer = load_tokenizer(base, revision)
        train_adapters(model, tokenizer, jobs, config=config, text=text, batching=batching, save_dtype=save_dtype)
        if gates:
            train_gates(model, tokenizer, jobs, config=gate_config, text=text, batching=batching, save_dtype=save_dtype)
        folders = [job.folder for job in jobs]
    typer.echo("\n".join(f"expert: {folder}" for folder in folders))
