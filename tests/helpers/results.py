"""Results folders as `phatgoose eval` writes them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PAPER = json.loads((Path(__file__).parents[1] / "results" / "paper_tables.json").read_text(encoding="utf-8"))


def add_row(folder, suite, task, method, scores, *, ids=None, seed=0, **changes):
    """Append one cell; `scores` has one number a row, `ids` the example that each row renders."""
    ids = [f"{task}-{i}" for i in range(len(scores))] if ids is None else ids
    cell = hashlib.sha256(f"{suite} {task} {method} {seed}".encode()).hexdigest()[:12]
    examples = f"examples/{suite}/{task}/{cell}.json"
    path = folder / examples
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"example_ids": list(ids), "scores": list(scores)}))
    row = {
        "format": 1,
        "suite": suite,
        "task": task,
        "method": method,
        "config": {"router": method, "top_k": 2},
        "seed": seed,
        "metric": "accuracy",
        "score": sum(scores) / len(scores),
        "num_rows": len(scores),
        "limit": None,
        "pool": "a" * 64,
        "pool_name": "tiny",
        "base": "tiny",
        "data": hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest(),
        "text": {"separator": "\n"},
        "dtype": "fp32",
        "versions": {},
        "seconds": 1.0,
        "examples": examples,
    } | changes
    with (folder / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return path


def add_paper_table(folder, table):
    """One of the paper's tables; its scores are whole datasets, so each is one example."""
    for method, scores in table["scores"].items():
        for task, score in zip(table["tasks"], scores, strict=True):
            pool = hashlib.sha256(table["pool"].encode()).hexdigest()
            name = method.lower() if method == "PHATGOOSE" else method
            add_row(folder, table["suite"], task, name, [score / 100], pool=pool, pool_name=table["pool"])
    return folder
