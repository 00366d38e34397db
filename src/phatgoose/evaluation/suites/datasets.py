"""Rows from datasets on the hub."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phatgoose.errors import DataError
from phatgoose.evaluation.suites.rendering import read_templates, render
from phatgoose.evaluation.suites.rows import TaskRow

ANSWER = "\nAnswer:"


def read_dataset(path: str, name: str | None, split: str) -> Sequence[Mapping[str, Any]]:
    """Load a split of a dataset.

    Raises:
        DataError: `datasets` is not installed, or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError("datasets from the hub need package `datasets`", fix="pip install 'phatgoose[eval]'") from error
    try:
        records: Sequence[Mapping[str, Any]] = datasets.load_dataset(path, name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load dataset {path!r}{f', {name}' if name else ''}, split {split}",
            found=str(error).splitlines()[0],
            expected="a dataset on the hub, or a local folder of that name",
            fix="--data DIR, if you have the tasks as files",
        ) from error
    return records


def templated_rows(task: str, records: Sequence[Mapping[str, Any]], templates: str) -> Iterator[TaskRow]:
    """T0's held-out tasks: each record with each template of the file `templates` that applies to it."""
    prompts = read_templates(templates)
    for i, record in enumerate(records):
        yield from render(prompts, record, f"{task}/{i:05d}")


def bigbench_rows(task: str, records: Sequence[Mapping[str, Any]], metric: str) -> Iterator[TaskRow]:
    """Rows of tasksource/bigbench (inputs, targets, multiple_choice_targets, multiple_choice_scores)."""
    for i, record in enumerate(records):
        choices, scores = record["multiple_choice_targets"], record["multiple_choice_scores"]
        targets = record["targets"]
        if metric.startswith("multiple_choice"):
            targets = [choice for choice, score in zip(choices, scores, strict=True) if score == max(scores)]
        yield TaskRow(
            example_id=f"{task}/{i}",
            input=_question(record["inputs"]),
            targets=tuple(targets),
            choices=tuple(choices) if metric.startswith("multiple_choice") else None,
        )


def bbh_rows(task: str, records: Sequence[Mapping[str, Any]], choices: Sequence[str] | None) -> Iterator[TaskRow]:
    """Rows of lukaemon/bbh (input, target)."""
    for i, record in enumerate(records):
        yield TaskRow(
            example_id=f"{task}/{i}",
            input=record["input"] + ANSWER,
            targets=(record["target"],),
            choices=tuple(choices) if choices else None,
        )


def _question(text: str) -> str:
    """An input that ends with `ANSWER`, in place of the task's own "A:" or "Answer:" if it has one."""
    question, _, last = text.rstrip().rpartition("\n")
    return (question if last.strip() in ("A:", "Answer:") else text) + ANSWER
