"""Rows: what a task asks a model, one request or one set of choices each."""

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

SEED = 20240213  # of every sample and of every choice that a prompt template makes


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rendering of one example.

    Attributes:
        example_id: of the example; several rows may render one.
        input: what the model reads.
        targets: right answers. With choices: the right ones among them.
        choices: what the model chooses from; None if it writes the answer.
    """

    example_id: str
    input: str
    targets: tuple[str, ...]
    choices: tuple[str, ...] | None = None

    @property
    def chance(self) -> float:
        """Mean score of a choice drawn blindly; 0 for a written answer."""
        return 0.0 if self.choices is None else sum(text in self.targets for text in self.choices) / len(self.choices)


def fingerprint(rows: Sequence[Row]) -> str:
    """sha256 over all rows in order."""
    return hashlib.sha256(json.dumps([asdict(row) for row in rows]).encode()).hexdigest()


def sample(rows: Sequence[Row], limit: int | None) -> list[Row]:
    """At most `limit` rows, drawn with a fixed seed, in their order; all if None.

    The same rows for every method and every seed of a run, so that results can be paired.
    """
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i] for i in sorted(sampling.sample(range(len(rows)), limit, SEED))]


def read_rendered(path: Path) -> Iterator[Row]:
    """Rows with `input`, `choices`, `label` (number of the right choice) and `example_id`."""
    for where, fields in read_rows(path):
        choices, label = _texts(where, fields, "choices"), fields.get("label")
        if not isinstance(label, int) or not 0 <= label < len(choices):
            raise _odd(where, "label", label, f"a whole number from 0 to {len(choices) - 1}")
        yield _row(where, fields, targets=(choices[label],), choices=choices)


def read_bigbench(path: Path, metric: str) -> Iterator[Row]:
    """Rows with `input`, `targets`, `choices` (or null), `metric` and `example_id`."""
    for where, fields in read_rows(path):
        if fields.get("metric") != metric:
            raise _odd(where, "metric", fields.get("metric"), metric)
        choices = None if fields.get("choices") is None else _texts(where, fields, "choices")
        yield _row(where, fields, targets=_texts(where, fields, "targets"), choices=choices)


def read_split(path: Path, split: str) -> Iterator[Row]:
    """Rows of one `split` with `input`, `target`, `choices` (or null) and `example_id`; those without a split count."""
    for where, fields in read_rows(path):
        if fields.get("split", split) == split:
            choices = None if fields.get("choices") is None else _texts(where, fields, "choices")
            if not isinstance(fields.get("target"), str):
                raise _odd(where, "target", fields.get("target"), "a string")
            yield _row(where, fields, targets=(fields["target"],), choices=choices)


def _row(where: str, fields: dict[str, Any], **answers: Any) -> Row:
    for name in ("example_id", "input"):
        if not isinstance(fields.get(name), str):
            raise _odd(where, name, fields.get(name), "a string")
    return Row(example_id=fields["example_id"], input=fields["input"], **answers)


def _texts(where: str, fields: dict[str, Any], name: str) -> tuple[str, ...]:
    found = fields.get(name)
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise _odd(where, name, found, "a list of strings")
    return tuple(found)


def _odd(where: str, name: str, found: object, expected: str) -> DataError:
    return DataError(f"{where} has an odd {name!r}", found=repr(found)[:80], expected=expected)
