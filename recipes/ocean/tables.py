"""Stage tables: comparisons of methods and of settings, figures of the routing, and the packed rows."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from evaluation import RECORDED
from grids import ALL_TASKS, GRIDS, SETTINGS
from packing import pack

from phatgoose.errors import ResultsError
from phatgoose.evaluation.methods import EXPERTS
from phatgoose.results.comparison import Comparison, compare
from phatgoose.results.names import is_expert
from phatgoose.results.page import write_comparison_page
from phatgoose.results.reader import read_results
from phatgoose.results.rows import Result
from phatgoose.results.tables import markdown

OURS = "phatgoose-retrieval"
# sections of tables.md: comparison -> heading
SECTIONS = {
    "comparison": "All methods, all tasks, three seeds",
    "above-chance": "The same without tasks at chance",
    "settings-all-tasks": "PHATGOOSE's settings and sizes of pools, all tasks, one seed",
    "settings": "All settings, tasks with choices, one seed",
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows to compare, and how: see `compare`."""

    results: Sequence[Result]
    against: str = "phatgoose"
    above_chance: bool = False


def write_tables(args: argparse.Namespace) -> None:
    """Everything that docs/results.md is made of."""
    rows = args.packed or args.out / "rows"
    for seed in args.seeds:
        pack(args.out / f"seed-{seed}", rows)
    archives = archives_of(rows, args.seeds)
    results = [result for result in read(archives) if is_wanted(result, args)]
    compared = {}
    for name, table in tables_of(results, rows, min(args.seeds)).items():
        comparison = compared_of(name, table)
        if comparison is not None:
            compared[name] = comparison
            (args.out / f"{name}.md").write_text(markdown(comparison), encoding="utf-8")
            write_comparison_page(args.out / f"{name}.html", comparison)
            print(f"wrote {args.out / name}.md and .html")
    (args.out / "tables.md").write_text(joined(compared), encoding="utf-8")
    for router in RECORDED:
        recordings = [path for seed in args.seeds if (path := rows / f"seed-{seed}-recording-{router}").is_dir()]
        if recordings and (args.routers is None or router in args.routers):
            command = [
                sys.executable, "-m", "phatgoose", "analyse", *recordings, "--out", args.out / f"analysis-{router}",
                *(part for path in archives for part in ("--results", path)),
            ]  # fmt: skip
            subprocess.run([str(part) for part in command], check=True)


def archives_of(rows: Path, seeds: Sequence[int]) -> list[Path]:
    """The packed rows of the seeds' main pools."""
    return [path for seed in seeds if (path := rows / f"seed-{seed}-results.tar.xz").is_file()]


def read(archives: Sequence[Path]) -> list[Result]:
    """Rows of results folders."""
    results, warnings = read_results(archives)
    for warning in warnings:
        print(warning)
    return results


def is_wanted(result: Result, args: argparse.Namespace) -> bool:
    """Whether --routers and --tasks ask for a row."""
    method = EXPERTS if is_expert(result.method) else result.method
    return (args.routers is None or method in args.routers) and (not args.tasks or result.task in args.tasks)


def tables_of(results: Sequence[Result], rows: Path, first_seed: int) -> dict[str, Table]:
    """What is compared, by name.

    Args:
        results: rows of the seeds' main pools.
        rows: folder of packed rows, those of other pools among them.
        first_seed: the seed whose settings and other pools are compared.
    """
    methods = [result for result in results if result.method not in SETTINGS]
    first = [result for result in results if result.seed == first_seed and not is_expert(result.method)]
    others = of_other_pools(rows, first_seed, first[0].pool)
    tables = {
        "comparison": Table(results=methods),
        "above-chance": Table(results=methods, above_chance=True),
        "settings-all-tasks": Table(results=[*(r for r in first if r.method in ALL_TASKS), *others]),
        "settings": Table(results=[*first, *others]),
    }
    if any(result.method == OURS for result in methods):
        tables["ours"] = Table(results=methods, against=OURS)
        tables["ours-above-chance"] = Table(results=methods, against=OURS, above_chance=True)
    return tables


def of_other_pools(rows: Path, seed: int, pool: str) -> list[Result]:
    """Results of a seed's other pools, as methods of its main pool, so that they can be paired."""
    results = []
    for grid in GRIDS:
        archive = rows / f"seed-{seed}-{grid.results}.tar.xz"
        if grid.label and archive.is_file():
            results += [
                replace(result, method=f"{result.method} ({grid.label})", pool=pool, config=None)
                for result in read([archive])
            ]
    return results


def compared_of(name: str, table: Table) -> Comparison | None:
    """The comparison on the tasks that all methods have; None if no task is above chance."""
    try:
        return compare(table.results, against=table.against, common=True, above_chance=table.above_chance)
    except ResultsError as error:
        if not table.above_chance:
            raise
        # a few rows of a tiny model can be at chance everywhere
        print(f"no {name}: {error}")
        return None


def joined(compared: Mapping[str, Comparison]) -> str:
    """The comparisons of `SECTIONS` as one page in Markdown."""
    parts = ["# Tables of the results\n\nMade by recipes/ocean; docs/results.md says what they mean.\n"]
    for name, heading in SECTIONS.items():
        if name in compared:
            _, text = markdown(compared[name]).split("\n", 1)
            text = text.replace("\n## ", "\n### ")
            parts.append(f"## {heading}\n{text}")
    return "\n".join(parts)
