"""Jobs: the experts that one call trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.data.examples import Example, read_examples
from phatgoose.errors import ConfigError, GateError
from phatgoose.experts.expert import Expert, check_name


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One of several experts to train.

    Attributes:
        folder: the expert's folder, whose name is the expert's. `train_adapters`
            creates it; `train_gates` needs an adapter in it.
        examples: training data.
        validation: if given, the adapter with the lowest loss on it is kept.
    """

    folder: Path
    examples: Sequence[Example]
    validation: Sequence[Example] = ()

    @property
    def name(self) -> str:
        """The expert's name."""
        return self.folder.name

    def work(self, suffix: str) -> Path:
        """Work folder of a group that this expert leads, beside the expert's own folder."""
        return self.folder.with_name(self.name + suffix)


def read_jobs(files: Sequence[Path], out: Path, split: str, validation_split: str | None) -> list[TrainingJob]:
    """Make a job for each data file; the file's stem names the expert.

    Args:
        files: .jsonl or .jsonl.gz files.
        out: folder in which each expert gets its folder.
        split: split of the rows to train on.
        validation_split: split of the rows to choose checkpoints by; None for none.

    Raises:
        ConfigError: a file has another ending, its stem is not a valid name, or two stems are equal.
        DataError: a file is missing, broken or empty; the error names the line.
    """
    jobs = []
    for file in files:
        if not file.name.endswith((".jsonl", ".jsonl.gz")):
            raise ConfigError(f"{file} is not a data file", expected="a .jsonl or .jsonl.gz file for each expert")
        jobs.append(
            TrainingJob(
                folder=out / check_name(file.name.removesuffix(".gz").removesuffix(".jsonl")),
                examples=read_examples(str(file), split),
                validation=read_examples(str(file), validation_split) if validation_split else (),
            )
        )
    check_names(jobs)
    return jobs


def check_names(jobs: Sequence[TrainingJob]) -> None:
    """Raise ConfigError if two jobs have the same name, or one has an invalid name."""
    names = [check_name(job.name) for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two experts are named {twice[0]!r}", expected="a name for each", fix="rename one of the data files"
        )


def has_adapter(job: TrainingJob) -> bool:
    """Whether a job's adapter is finished.

    Raises:
        AdapterError: the job's folder holds something else.
    """
    return job.folder.exists() and bool(Expert(job.folder))


def has_own_gate(job: TrainingJob) -> bool:
    """Whether a job's expert has a gate that was trained for its adapter.

    Raises:
        AdapterError: the adapter is missing or damaged.
    """
    expert = Expert(job.folder)
    try:
        return expert.has_gate and bool(expert.load_gate())
    except GateError:
        return False
