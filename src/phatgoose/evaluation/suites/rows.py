"""Rows of a task: each is one question to a model, with choices or without."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from phatgoose.data import sampling
from phatgoose.data.examples import read_rows
from phatgoose.errors import DataError

# seed of all samples of rows, and of random choices in prompt templates
SEED = 20240213


@dataclass(frozen=True, kw_only=True)
class TaskRow:
    """An example, rendered with one prompt template.

    Attributes:
        example_id: id of the example; several rows may render the same one.
        input: text that the model reads.
        targets: right answers; with choices, the right ones among them.
        choices: possible answers; None if the model writes the answer.
    """

    example_id: str
    input: str
    targets: tuple[str, ...]
    choices: tuple[str, ...] | None = None

    @property
    def chance(self) -> float:
        """Expected score of a random choice; 0 for a written answer."""
        return 0.0 if self.choices is None else sum(text in self.targets for text in self.choices) / len(self.choices)


def fingerprint(rows: Sequence[TaskRow]) -> str:
    """sha256 of all rows, in order."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()


def sample(rows: Sequence[TaskRow], limit: int | None) -> list[TaskRow]:
    """A random sample of at most `limit` rows, in their original order; all rows if None.

    The seed is fixed: every method and every seed of a run gets the same rows, so that results can be paired.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(sampling.sample(range(len(rows)), limit, SEED))]


def read_rendered(path: Path) -> Iterator[TaskRow]:
    """Rows with `input`, `choices`, `label` (index of the right choice) and `example_id`."""
    for where, fields in read_rows(path):
        choices, label = _texts(where, fields, "choices"), fields.get("label")
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise _invalid(where, "label", label, f"an integer from 0 to {len(choices) - 1}")
        yield _row(where, fields, targets=(choices[label],), choices=choices)


def read_bigbench(path: Path, metric: str) -> Iterator[TaskRow]:
    """Rows with `input`, `targets`, `choices` (or null), `metric` and `example_id`."""
    for where, fields in read_rows(path):
        if fields.get("metric") != metric:
            raise _invalid(where, "metric", fields.get("metric"), metric)
        choices = None if fields.get("choices") is None else _texts(where, fields, "choices")
        yield _row(where, fields, targets=_texts(where, fields, "targets"), choices=choices)


def read_split(path: Path, split: str) -> Iterator[TaskRow]:
    """Rows of `split`, and rows without a split, with `input`, `target`, `choices` (or null) and `example_id`."""
    for where, fields in read_rows(path):
        if fields.get("split", split) == split:
            choices = None if fields.get("choices") is None else _texts(where, fields, "choices")
            if not isinstance(fields.get("target"), str):
                raise _invalid(where, "target", fields.get("target"), "a string")
            yield _row(where, fields, targets=(fields["target"],), choices=choices)


def _row(where: str, fields: dict[str, Any], **answers: Any) -> TaskRow:
    for name in ("example_id", "input"):
        if not isinstance(fields.get(name), str):
            raise _invalid(where, name, fields.get(name), "a string")
    return TaskRow(example_id=fields["example_id"], input=fields["input"], **answers)


def _texts(where: str, fields: dict[str, Any], name: str) -> tuple[str, ...]:
    texts = fields.get(name)
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise _invalid(where, name, texts, "a list of strings")
    return tuple(texts)


def _invalid(where: str, name: str, value: object, expected: str) -> DataError:
    return DataError(f"{where} has an invalid {name!r}", found=repr(value)[:80], expected=expected)
