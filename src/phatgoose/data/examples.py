"""Examples for training and evaluation, read from jsonl files or with the `datasets` library."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from phatgoose.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Example:
    """One example: a prompt and its answer.

    Attributes:
        input: the prompt.
        target: the answer that the model should give.
        choices: all possible answers; None if answers are free text.
    """

    input: str
    target: str
    choices: tuple[str, ...] | None = None


def read_examples(source: str, split: str | None = None) -> list[Example]:
    """Read examples from a jsonl file, or a dataset by its name.

    Args:
        source: path of a .jsonl or .jsonl.gz file, whose lines are objects with the
            strings `input` and `target` and optionally `choices` (a list of strings)
            and `split`; or a dataset with these columns, as `name` or `name:config`,
            for the `datasets` library.
        split: read only rows of this split. Rows of a file without `split` belong to
            every split. None reads all rows of a file, or a dataset's "train".

    Returns:
        At least one example, in the order of the source.

    Raises:
        DataError: the source is missing, broken (the error names the line) or has no
            such rows, or `datasets` is needed and not installed.
    """
    if source.endswith((".jsonl", ".jsonl.gz")):
        examples = list(_read_jsonl(Path(source), split))
    else:
        examples = _read_dataset(source, split or "train")
    if not examples:
        raise DataError(f"{source} has no examples", found=f"no rows of split {split!r}" if split else "no rows")
    return examples


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 of all examples in order, as recorded with every gate and prototype."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.input, example.target, example.choices]).encode())
    return digest.hexdigest()


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the objects of a .jsonl or .jsonl.gz file; empty lines are skipped.

    Yields:
        The place of a row for error messages ("FILE, line 3"), and the row.

    Raises:
        DataError: the file is missing, or a line is broken; the error names it.
    """
    if not path.is_file():
        raise DataError(f"no data file {path}", expected="a .jsonl or .jsonl.gz file", fix="check the path")
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _parse_line(path, number, line)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}", found=str(error), expected="UTF-8 text, gzipped if .gz") from error


def _read_jsonl(path: Path, split: str | None) -> Iterator[Example]:
    for where, row in read_rows(path):
        if split is None or row.get("split", split) == split:
            yield _example(where, row)


def _open_text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _parse_line(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {number} is not JSON",
            found=f"{line.strip()[:60]!r}: {error.msg}",
            expected='{"input": "...", "target": "..."}',
            fix="correct or delete the line",
        ) from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} is not an object", found=type(row).__name__, expected="a JSON object")
    return row


def _example(where: str, row: dict[str, Any]) -> Example:
    for name in ("input", "target"):
        if not isinstance(row.get(name), str):
            raise DataError(
                f"{where} has no text {name!r}",
                found=f"fields {sorted(row)}" if name not in row else f"{name}: {row[name]!r}",
                expected="strings `input` and `target`",
                fix="rename the fields of your data",
            )
    choices = row.get("choices")
    if choices is not None and not (isinstance(choices, list) and all(isinstance(c, str) for c in choices)):
        raise DataError(f"{where} has invalid choices", found=repr(choices)[:60], expected="a list of strings, or null")
    return Example(input=row["input"], target=row["target"], choices=tuple(choices) if choices else None)


def _read_dataset(source: str, split: str) -> list[Example]:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{source} is not a .jsonl file, and `datasets` is not installed", fix="pip install 'phatgoose[datasets]'"
        ) from error
    name, _, config = source.partition(":")
    try:
        rows = datasets.load_dataset(name, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"cannot load dataset {source!r}, split {split!r}",
            found=str(error).splitlines()[0],
            expected="a .jsonl file, or a dataset's name",
        ) from error
    return [_example(f"{source}, row {i}", dict(row)) for i, row in enumerate(rows)]
