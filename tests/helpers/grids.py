"""A folder with a base, pools and tiny tasks of each kind, and what to ask `phatgoose eval` there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from helpers.data import as_text, token_ids
from helpers.models import llama, make_base
from helpers.pools import make_adapter, make_pool
from phatgoose.experts.pool import Pool

SEPARATOR = " <3> "
ROWS = 14


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def words(length: int, seed: int) -> str:
    return as_text(token_ids(length, seed=seed).tolist())


def choosing(name: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Two rows an example, two choices of unlike length."""
    return [
        {
            "input": words(1 + i % 9, seed + i),
            "choices": [words(1, seed + 500 + i), words(2 + i % 2, seed + 900 + i)],
            "label": i % 2,
            "example_id": f"{name}/{i // 2}",
        }
        for i in range(number)
    ]


def held_in(name: str, number: int, seed: int, *, with_choices: bool) -> list[dict[str, Any]]:
    """Half of them for training."""
    rows = []
    for i, row in enumerate(choosing(name, number, seed)):
        split = "validation" if i % 2 else "train"
        choices = row["choices"] if with_choices else None
        rows.append({**row, "choices": choices, "target": row["choices"][i % 3 % 2], "split": split})
    return rows


def make_grid(folder: Path, rows: int = ROWS) -> Path:
    """Base tiny-llama; pools `pool` (e0, e1, e2) and `gateless`; data of t0ho (rte, cb), bbh and t0hi (e0, e1)."""
    make_base(llama, folder / "tiny-llama")
    make_pool(llama, folder, 3)
    Pool.create(folder / "gateless", "tiny-llama").add(make_adapter(llama, folder / "bare", seed=7))
    data = folder / "data"
    for seed, name in enumerate(("rte", "cb")):
        write_rows(data / "t0ho" / "rendered" / f"{name}.jsonl.gz", choosing(name, rows, 1000 * seed))
    counting = [
        {"input": words(3, i), "targets": [words(1, i), words(1, i + 1)], "choices": None, "scores": None,
         "metric": "exact_match_multi", "example_id": f"object_counting/{i}"}
        for i in range(rows)
    ]  # fmt: skip
    write_rows(data / "bbh" / "object_counting.jsonl.gz", counting)
    write_rows(data / "t0hi" / "e0.jsonl.gz", held_in("e0", 2 * rows, 3000, with_choices=True))
    write_rows(data / "t0hi" / "e1.jsonl.gz", held_in("e1", 2 * rows, 4000, with_choices=False))
    return folder


def grid(router: str, out: str = "out", suite: str = "t0ho", task: str | None = "rte,cb", **options: Any) -> list[str]:
    """The arguments of `phatgoose eval`."""
    settings = {"pool": "pool", "data": "data", "suite": suite, "router": router, "out": out, "separator": SEPARATOR}
    settings |= {"device": "cpu"} | ({} if task is None else {"task": task}) | options
    return ["eval", *(part for name, value in settings.items() for part in (f"--{name.replace('_', '-')}", str(value)))]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows, without what differs between runs."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


def recording(out: Path | str, suite: str = "t0ho,leave-one-out", **options: Any) -> list[str]:
    settings = {"suite": suite, "task": "rte,cb,e0,e1", "data": "data", "out": out, "separator": SEPARATOR}
    settings |= {"device": "cpu", "limit": 6} | options
    if "leave-one-out" not in suite:
        settings["task"] = "rte,cb"
    return [
        "record",
        options.pop("pool", "pool"),
        *(part for name, value in settings.items() if name != "pool" for part in (f"--{name}", str(value))),
    ]
