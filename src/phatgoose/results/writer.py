"""Writes the results folder of `phatgoose eval`; docs/evaluation.md describes the formats.

    rows.jsonl                                one line per finished cell
    examples/<suite>/<task>/<cell id>.json    the scores of the cell's rows

A cell's examples are written first and its line last, so that a killed run
leaves whole cells or none. `phatgoose.results.reader` reads the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from phatgoose.errors import ResultsError
from phatgoose.files import write_json
from phatgoose.results.rows import FORMAT, ROWS_FILE

# fields that identify a cell within a folder
CELL = ("suite", "task", "method", "seed")
# fields in which a finished cell must agree with one that is asked for
SETTINGS = ("config", "limit", "base", "data", "text", "dtype")
# packages whose versions each row records
PACKAGES = ("phatgoose", "torch", "transformers", "peft", "lm_eval")


class ResultsFolder:
    """A results folder that is being written: the finished cells of one pool.

    Args:
        folder: the folder; created with its first row.
        pool: the pool's fingerprint.

    Raises:
        ResultsError: `folder` is not a folder, its rows are damaged, or they
            belong to another pool.
    """

    def __init__(self, folder: Path, pool: str) -> None:
        self.folder = folder
        self.pool = pool
        if folder.exists() and not folder.is_dir():
            raise ResultsError(
                f"{folder} is not a folder", expected="a results folder, or a new name", fix="--out OTHER"
            )
        self.rows = _read(folder / ROWS_FILE)
        others = [row["pool"] for row in self.rows if row.get("pool") != pool]
        if others:
            raise ResultsError(
                f"{folder} holds results of another pool",
                found=f"pool {others[0]}",
                expected=f"pool {pool}",
                fix="--out OTHER: one folder per pool; phatgoose compare reads several",
            )

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a finished cell; None if the cell is not finished.

        Args:
            key: the fields `CELL` and `SETTINGS`.

        Raises:
            ResultsError: the cell was finished with other settings.
        """
        for row in self.rows:
            if all(row.get(name) == key[name] for name in CELL):
                unequal = [name for name in SETTINGS if row.get(name) != key[name]]
                if unequal:
                    raise ResultsError(
                        f"{self.folder} has {key['suite']}/{key['task']} with {key['method']}, seed {key['seed']},"
                        f" with another {unequal[0]}",
                        found=str(row.get(unequal[0])),
                        expected=str(key[unequal[0]]),
                        fix="--out OTHER, or the earlier settings",
                    )
                return row
        return None

    def append(
        self, key: Mapping[str, Any], values: Mapping[str, Any], example_ids: Sequence[str], scores: Sequence[float]
    ) -> None:
        """Write a finished cell.

        Args:
            key: the fields `CELL` and `SETTINGS`.
            values: the other fields of the cell's line.
            example_ids: the example of each row.
            scores: the score of each row, from 0 to 1.
        """
        name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
        examples = f"examples/{key['suite']}/{key['task']}/{name}.json"
        row = {"format": FORMAT, **key, **values, "pool": self.pool, "examples": examples}
        path = self.folder / examples
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            for unfinished in path.parent.glob(f".{path.name}.*"):  # left by a killed run
                unfinished.unlink()
            write_json(path, {"example_ids": list(example_ids), "scores": list(scores)})
            _append_line(self.folder / ROWS_FILE, json.dumps(row, ensure_ascii=False))
        self.rows.append(row)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # the last line is empty, or was cut off when a run was killed
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
            if rows[-1]["format"] != FORMAT:
                raise KeyError("format")
        except (ValueError, KeyError, TypeError) as error:
            raise ResultsError(
                f"{path}, line {number} cannot be read",
                found=line[:60],
                expected=f"a row of format {FORMAT}",
                fix="delete the line, or --out OTHER",
            ) from error
    return rows


def _append_line(path: Path, line: str) -> None:
    """Append a line, after removing what a killed run left of its last one."""
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
