"""The experts that one call trains: a job for each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phatgoose.data.examples import Example, read_examples
from phatgoose.errors import ConfigError
from phatgoose.experts.expert import check_name


@dataclass(frozen=True, kw_only=True)
class TrainingJob:
    """One of several experts to be trained.

    Attributes:
        folder: of the expert; `train_adapters` makes it, `train_gates` wants an
            adapter in it. Its name is the expert's.
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
        """Where the checkpoints of a group that this expert leads are kept."""
        return self.folder.with_name(self.name + suffix)


def read_jobs(files: Sequence[Path], out: Path, split: str, validation_split: str | None) -> list[TrainingJob]:
    """A job for each data file, whose stem names the expert.

    Args:
        files: .jsonl or .jsonl.gz.
        out: gets a folder for each.
        split: rows to train on.
        validation_split: rows to choose checkpoints by; None for none.

    Raises:
        ConfigError: a file has another ending, or a name that no expert can have.
        DataError: missing, broken or empty; it names the line.
    """
    jobs = []
    for file in files:
        if not file.name.endswith((".jsonl", ".jsonl.gz")):
            raise ConfigError(f"{file} is no data file", expected="a .jsonl or .jsonl.gz file for each expert")
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
    """Raise ConfigError if two jobs have one name, or one has a name that no expert can have."""
    names = [check_name(job.name) for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"two experts are named {twice[0]!r}", expected="a name for each", fix="rename one of the data files"
        )
