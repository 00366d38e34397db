"""The folder that `phatgoose eval` writes finished cells to; docs/evaluation.md has its formats.

    rows.jsonl                                one line a finished cell
    examples/<suite>/<task>/<cell id>.json    the scores of its rows

A cell's examples are written first, its line last, so that a killed run leaves
whole cells or none. `phatgoose.results.rows` reads it.
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

CELL = ("suite", "task", "method", "seed")  # no two rows of a folder agree in these
SETTINGS = ("config", "limit", "base", "data", "text", "dtype")  # in which a cell done again must agree


class ResultsFolder:
    """Rows of one pool.

    Args:
        folder: made when the first row is written.
        pool: the pool's fingerprint.

    Raises:
        ResultsError: it is no folder, or its rows are of another pool or damaged.
    """

    def __init__(self, folder: Path, pool: str) -> None:
        self.folder = folder
        self.pool = pool
        if folder.exists() and not folder.is_dir():
            raise ResultsError(f"{folder} is no folder", expected="a results folder, or nothing", fix="--out OTHER")
        self.rows = _read(folder / ROWS_FILE)
        others = [row["pool"] for row in self.rows if row.get("pool") != pool]
        if others:
            raise ResultsError(
                f"{folder} holds results of another pool",
                found=f"pool {others[0]}",
                expected=f"pool {pool}",
                fix="--out OTHER, one folder a pool; phatgoose compare reads several",
            )

    def find(self, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The row of a cell, if it is there.

        Args:
            key: the fields `CELL` and `SETTINGS`.

        Raises:
            ResultsError: it is there with other settings.
        """
        for row in self.rows:
            if all(row.get(name) == key[name] for name in CELL):
                odd = [name for name in SETTINGS if row.get(name) != key[name]]
                if odd:
                    raise ResultsError(
                        f"{self.folder} has {key['suite']}/{key['task']} with {key['method']}, seed {key['seed']},"
                        f" under another {odd[0]}",
                        found=str(row.get(odd[0])),
                        expected=str(key[odd[0]]),
                        fix="--out OTHER, or the settings of before",
                    )
                return row
        return None

    def append(
        self, key: Mapping[str, Any], values: Mapping[str, Any], example_ids: Sequence[str], scores: Sequence[float]
    ) -> None:
        """Write a finished cell.

        Args:
            key: the fields `CELL` and `SETTINGS`.
            values: the other fields of its row.
            example_ids: of its rows.
            scores: of its rows, from 0 to 1.
        """
        name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
        examples = f"examples/{key['suite']}/{key['task']}/{name}.json"
        row = {"format": FORMAT, **key, **values, "pool": self.pool, "examples": examples}
        path = self.folder / examples
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            for unfinished in path.parent.glob(f".{path.name}.*"):  # of a killed run
                unfinished.unlink()
            write_json(path, {"example_ids": list(example_ids), "scores": list(scores)})
            _append_line(self.folder / ROWS_FILE, json.dumps(row, ensure_ascii=False))
        self.rows.append(row)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")  # the last is empty, or torn
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
                fix="take the line out, or --out OTHER",
            ) from error
    return rows


def _append_line(path: Path, line: str) -> None:
    """Add one line; what a killed run left of its last one goes first."""
    with path.open("a+b") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


PACKAGES = ("phatgoose", "torch", "transformers", "peft", "lm_eval")
