"""Stage train: experts with gates and prototypes, Multitask, the pool. Stage variants: gates made otherwise."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from grids import GATES, JOINT
from joint_gates import train_jointly
from times import timed

from phatgoose.config import AdapterTrainingConfig, BatchingConfig, GateConfig, TextConfig
from phatgoose.data.sampling import sample
from phatgoose.evaluation.methods import MULTITASK
from phatgoose.experts.adapter import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.embeddings import SentenceEncoder, save_example_embeddings
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.models.base import load_base, load_tokenizer
from phatgoose.training.group.jobs import TrainingJob, read_jobs
from phatgoose.training.group.train import train_adapters, train_gates
from phatgoose.training.mean_activations import save_mean_activations

# longer targets are summaries, of which 128 tokens are written in evaluation; they would fill a GPU's memory
TEXT = TextConfig(max_target_tokens=128)


def datasets(args: argparse.Namespace) -> list[str]:
    """Names of the experts, in alphabetical order."""
    names = args.datasets or [path.name.removesuffix(".jsonl.gz") for path in (args.data / "t0hi").glob("*.jsonl.gz")]
    return sorted(names)


class Training:
    """One seed's models and settings."""

    def __init__(self, args: argparse.Namespace, seed: int) -> None:
        self.args = args
        self.seed = seed
        self.folder = args.out / f"seed-{seed}"
        self.model = load_base(args.base, dtype=args.dtype)
        self.tokenizer = load_tokenizer(args.base)
        common = {"dtype": args.dtype, "seed": seed}
        self.lora = AdapterTrainingConfig(
            rank=args.rank, steps=args.steps, learning_rate=args.learning_rate, batch_size=args.batch_size,
            save_steps=max(1, args.steps // 3), **common,
        )  # fmt: skip
        self.gates = GateConfig(
            steps=args.gate_steps, learning_rate=args.gate_learning_rate, batch_size=args.batch_size, **common
        )
        batching = BatchingConfig(
            experts_at_once=args.experts_at_once, positions_at_once=args.positions_at_once, compile=args.compile
        )
        self.options: dict[str, Any] = {"text": TEXT, "batching": batching, "save_dtype": "bf16"}

    def run(self) -> None:
        """Experts, Multitask and the pool."""
        jobs = self.jobs(self.folder / "experts")
        with timed(self.args, self.seed, "adapters"):
            train_adapters(self.model, self.tokenizer, jobs, config=self.lora, **self.options)
        with timed(self.args, self.seed, "gates"):
            train_gates(self.model, self.tokenizer, jobs, config=self.gates, **self.options)
        with timed(self.args, self.seed, MULTITASK):
            self.multitask(jobs)
        with timed(self.args, self.seed, "prototypes"):
            self.prototypes(jobs)
        self.pool(self.folder / "pool", jobs)

    def run_variants(self) -> None:
        """The same adapters with other gates, and adapters and gates that are trained together."""
        wanted = self.args.pools or (*GATES, JOINT)
        for name, changes in GATES.items():
            if name not in wanted:
                continue
            jobs = self.jobs(self.folder / name / "experts")
            for job in jobs:
                if not job.folder.exists():
                    link_adapter(self.folder / "experts" / job.name, job.folder)
            with timed(self.args, self.seed, name):
                gates = replace(self.gates, **changes)
                gates = replace(gates, steps=min(gates.steps, self.args.most_gate_steps))
                train_gates(self.model, self.tokenizer, jobs, config=gates, **self.options)
            self.pool(self.folder / name / "pool", jobs)
        if JOINT not in wanted:
            return
        jobs = self.jobs(self.folder / JOINT / "experts")
        with timed(self.args, self.seed, JOINT):
            train_jointly(self.model, self.tokenizer, jobs, config=self.lora, **self.options)
        self.pool(self.folder / JOINT / "pool", jobs)

    def jobs(self, out: Path) -> list[TrainingJob]:
        """One for each dataset; 128 rows tell well enough which checkpoint is the best."""
        files = [self.args.data / "t0hi" / f"{name}.jsonl.gz" for name in datasets(self.args)]
        jobs = read_jobs(files, out, "train", "validation")
        return [replace(job, validation=sample(job.validation, 128, seed=0)) for job in jobs]

    def multitask(self, jobs: Sequence[TrainingJob]) -> None:
        """One adapter for all datasets."""
        union = TrainingJob(
            folder=self.folder / MULTITASK,
            examples=list(chain.from_iterable(job.examples for job in jobs)),
            validation=list(chain.from_iterable(sample(job.validation, 16, seed=0) for job in jobs)),
        )
        steps = self.args.multitask_steps
        config = replace(
            self.lora, steps=steps, batch_size=self.args.multitask_batch_size, save_steps=max(1, steps // 4)
        )
        train_adapters(self.model, self.tokenizer, [union], config=config, **self.options)

    def prototypes(self, jobs: Sequence[TrainingJob]) -> None:
        """What Average Activation, Retrieval and GLIDER need."""
        encoder = SentenceEncoder()
        common = {"num_examples": self.args.prototype_examples, "seed": self.seed}
        for job in jobs:
            expert = Expert(job.folder)
            if not expert.brings("activations"):
                save_mean_activations(
                    self.model, self.tokenizer, expert, job.examples, text=TEXT, batch_size=64, save_dtype="bf16",
                    **common,
                )  # fmt: skip
            if not expert.brings("embeddings"):
                save_example_embeddings(expert.folder, job.examples, encoder=encoder, **common)

    def pool(self, path: Path, jobs: Sequence[TrainingJob]) -> None:
        """The experts as a pool."""
        pool = Pool.open(path) if (path / "pool.json").is_file() else Pool.create(path, self.args.base)
        for job in jobs:
            if job.name not in pool.names:
                pool.add(job.folder)


def link_adapter(source: Path, folder: Path) -> None:
    """The same adapter in another folder, without a copy of its numbers."""
    unfinished = folder.with_name(f".{folder.name}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        os.link(source / name, unfinished / name)
    unfinished.rename(folder)
