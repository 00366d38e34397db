"""Stage tables: the comparison, the settings beside each other, the figures, and the rows packed."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from evaluation import RECORDED
from grids import GRIDS, SETTINGS

from phatgoose.errors import ResultsError
from phatgoose.evaluation.methods import EXPERTS
from phatgoose.results.comparison import compare
from phatgoose.results.names import is_expert
from phatgoose.results.page import write_comparison_page
from phatgoose.results.reader import read_results
from phatgoose.results.rows import Result
from phatgoose.results.tables import markdown

OURS = "phatgoose-retrieval"


def write_tables(args: argparse.Namespace) -> None:
    """Everything that docs/results.md is made of."""
    rows = args.packed or args.out / "rows"
    for seed in args.seeds:
        pack(args.out / f"seed-{seed}", rows)
    archives = [path for seed in args.seeds if (path := rows / f"seed-{seed}-results.tar.xz").is_file()]
    main = [result for result in read(archives) if is_wanted(result, args)]
    settings = {result.method for result in main} & set(SETTINGS)
    methods = [result for result in main if result.method not in settings]
    write(args.out, "comparison", methods)
    write(args.out, "above-chance", methods, above_chance=True)
    if any(result.method == OURS for result in methods):
        write(args.out, "ours", methods, against=OURS)
        write(args.out, "ours-above-chance", methods, against=OURS, above_chance=True)
    first = [result for result in main if result.seed == min(args.seeds)]
    write(args.out, "settings", [*(r for r in first if not is_expert(r.method)), *of_other_pools(rows, first)])
    for router in RECORDED:
        recordings = [path for seed in args.seeds if (path := rows / f"seed-{seed}-recording-{router}").is_dir()]
        if recordings and (args.routers is None or router in args.routers):
            command = [
                sys.executable, "-m", "phatgoose", "analyse", *recordings, "--out", args.out / f"analysis-{router}",
                *(part for path in archives for part in ("--results", path)),
            ]  # fmt: skip
            subprocess.run([str(part) for part in command], check=True)


def is_wanted(result: Result, args: argparse.Namespace) -> bool:
    """Whether a row is of the methods and the tasks that were asked for."""
    method = EXPERTS if is_expert(result.method) else result.method
    return (args.routers is None or method in args.routers) and (not args.tasks or result.task in args.tasks)


def of_other_pools(rows: Path, first: Sequence[Result]) -> list[Result]:
    """Results of the first seed's other pools, as methods of the first pool, so that they can be paired."""
    found = []
    for grid in GRIDS:
        archive = rows / f"seed-{first[0].seed}-{grid.results}.tar.xz"
        if grid.label and archive.is_file():
            found += [
                replace(result, method=f"{result.method} ({grid.label})", pool=first[0].pool, config=None)
                for result in read([archive])
            ]
    return found


def read(archives: Sequence[Path]) -> list[Result]:
    """Rows of results folders."""
    results, warnings = read_results(archives)
    for warning in warnings:
        print(warning)
    return results


def write(
    out: Path, name: str, results: Sequence[Result], *, against: str = "phatgoose", above_chance: bool = False
) -> None:
    """A comparison as Markdown and as a page."""
    try:
        found = compare(results, against=against, common=True, above_chance=above_chance)
    except ResultsError as error:
        if not above_chance:
            raise
        # a few rows of a tiny model can be at chance everywhere
        print(f"no {name}: {error}")
        return
    (out / f"{name}.md").write_text(markdown(found), encoding="utf-8")
    write_comparison_page(out / f"{name}.html", found)
    print(f"wrote {out / name}.md and .html")


def pack(seed: Path, rows: Path) -> None:
    """One small archive for each results folder, the same bytes for the same rows; recordings are small as they are."""
    rows.mkdir(parents=True, exist_ok=True)
    for folder in sorted(seed.glob("results*")):
        with tarfile.open(rows / f"{seed.name}-{folder.name}.tar.xz", "w:xz") as archive:
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.name.startswith("."):
                    info = archive.gettarinfo(str(path), path.relative_to(folder).as_posix())
                    info.mtime = info.uid = info.gid = 0
                    info.uname = info.gname = ""
                    with path.open("rb") as file:
                        archive.addfile(info, file)
    for folder in sorted(seed.glob("recording-*")):
        target = rows / f"{seed.name}-{folder.name}"
        target.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if not path.name.startswith("."):
                (target / path.name).write_bytes(path.read_bytes())
