"""Jobs of several experts, and runs long enough to be killed."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

from helpers.data import as_text, make_examples, token_ids
from helpers.models import llama, make_tokenizer
from phatgoose import __version__
from phatgoose.config import AdapterTrainingConfig, BatchingConfig, GateConfig, TextConfig
from phatgoose.data.examples import Example
from phatgoose.experts.expert import Expert
from phatgoose.training.cluster.task import GroupTask
from phatgoose.training.group.jobs import TrainingJob
from phatgoose.training.group.train import train_adapters, train_gates
from phatgoose.training.single import train_adapter, train_gate

EXAMPLES = [
    Example(input=as_text(token_ids(5, seed=i).tolist()), target=as_text(token_ids(1 + i % 3, seed=100 + i).tolist()))
    for i in range(24)
]
LORA = AdapterTrainingConfig(steps=6, batch_size=4, accumulation=2, rank=3, alpha=6, save_steps=2)
GATE = GateConfig(steps=6, batch_size=4, accumulation=2)
SIZES = (24, 5, 17)  # an epoch that both batches and accumulation divide, one of two batches, one of neither


def make_jobs(folder: Path, sizes: tuple[int, ...] = SIZES, validation: int = 6) -> list[TrainingJob]:
    """Experts e0, e1, ...; every second one has no validation data."""
    return [
        TrainingJob(
            folder=folder / f"e{i}",
            examples=make_examples(size, seed=i),
            validation=make_examples(validation, seed=50 + i) if i % 2 == 0 else (),
        )
        for i, size in enumerate(sizes)
    ]


def train_one_long(what: str, folder: Path) -> None:
    """An adapter, or the gate of the one in `folder`: long enough to be killed."""
    if what == "adapter":
        config = AdapterTrainingConfig(steps=120, batch_size=2, rank=2, save_steps=10)
        train_adapter(llama(), make_tokenizer(), EXAMPLES, folder, config=config)
    else:
        gate_config = GateConfig(steps=120, batch_size=2)
        train_gate(llama(), make_tokenizer(), Expert(folder), EXAMPLES, config=gate_config)


def train_many_long(what: str, folder: Path, experts_at_once: int = 2) -> None:
    """Adapters, or the gates of those in `folder`: long enough to be killed."""
    options: dict[str, Any] = {"batching": BatchingConfig(experts_at_once=experts_at_once), "progress": False}
    if what == "adapter":
        config = replace(LORA, steps=120, batch_size=2, save_steps=10)
        train_adapters(llama(), make_tokenizer(), make_jobs(folder), config=config, **options)
    else:
        gate_config = replace(GATE, steps=120, batch_size=2)
        train_gates(llama(), make_tokenizer(), make_jobs(folder), config=gate_config, **options)


def start(function: str, what: str, folder: Path) -> Popen[bytes]:
    """Another process that calls one of the functions above, in one thread as this one."""
    path = str(Path(__file__).parents[1])
    code = f"""
import sys
sys.path.insert(0, {path!r})
from pathlib import Path
import torch
from helpers.training import {function}
torch.set_num_threads(1)
{function}({what!r}, Path({str(folder)!r}))
"""
    return Popen([sys.executable, "-c", code], stdout=DEVNULL, stderr=DEVNULL)


def make_task(folder: Path, files: tuple[Path, ...]) -> GroupTask:
    """A task in `folder`, which has the base tiny-llama."""
    notes = folder / "out" / ".ray"
    notes.mkdir(parents=True, exist_ok=True)
    (notes / "marker").touch()
    return GroupTask(
        files=files,
        out=folder / "out",
        cwd=folder,
        marker="marker",
        version=__version__,
        base="tiny-llama",
        revision=None,
        device=None,
        split="train",
        validation_split=None,
        config=AdapterTrainingConfig(steps=2, batch_size=2, rank=2),
        gate_config=GateConfig(steps=2, batch_size=2),
        text=TextConfig(),
        batching=BatchingConfig(experts_at_once=2),
        save_dtype="fp32",
        lock_timeout_s=0,
    )
