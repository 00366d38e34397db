"""Reads what `phatgoose eval` wrote, and checks it.

A results folder holds `rows.jsonl`, one finished cell (suite, task, method,
seed) per line, and the scores of each cell's examples in a file that the line
names. Folders of pools trained with different seeds are read together. A folder
may be packed as a tar archive, where thousands of small files about the same
examples take a fiftieth of the space.

Axes: C examples.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phatgoose.errors import ResultsError
from phatgoose.results.consistency import check_alike, check_pools, without_repeats
from phatgoose.results.rows import FORMAT, ROWS_FILE, Result

# largest difference between a row's score and the mean of its examples
ROUNDING = 1e-6
FIELDS: dict[str, type | tuple[type, ...]] = {
    "suite": str,
    "task": str,
    "method": str,
    "seed": int,
    "metric": str,
    "score": (int, float),
    "num_rows": int,
    "pool": str,
    "base": str,
    "data": str,
    "examples": str,
}
AGAIN = "the same phatgoose eval command evaluates that cell again"


def read_results(folders: Sequence[str | Path]) -> tuple[list[Result], list[str]]:
    """Read one or more results folders.

    Args:
        folders: results folders, or .tar, .tar.gz or .tar.xz archives of them,
            one pool each. Different pools must have different seeds: they count
            as repetitions of one experiment.

    Returns:
        The cells in the order of the files, and warnings (a torn last line).

    Raises:
        ResultsError: a folder without results, a damaged or newer file, rows
            of a task that do not belong together, two pools in one folder.
    """
    results: list[Result] = []
    warnings: list[str] = []
    for path in dict.fromkeys(Path(folder) for folder in folders):
        with _unpacked(path) as folder:
            rows, torn = _read_folder(folder)
        results += rows
        warnings += torn
    results = without_repeats(results)
    check_pools(results)
    check_alike(results)
    return results, warnings


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """A results folder: `path` itself, or the one in the archive `path`."""
    if not path.name.endswith((".tar", ".tar.gz", ".tar.xz")):
        yield path
        return
    with TemporaryDirectory() as temporary:
        try:
            with tarfile.open(path) as archive:
                # error messages then name the archive
                folder = Path(temporary) / path.name
                archive.extractall(folder, filter="data")
        except (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error) as error:
            raise ResultsError(
                f"{path} cannot be read", found=str(error), expected="a tar archive of a results folder"
            ) from error
        rows = [file.parent for file in sorted(folder.rglob(ROWS_FILE))]
        if len(rows) > 1:
            raise ResultsError(f"{path} holds {len(rows)} results folders", expected="one")
        yield rows[0] if rows else folder


def _read_folder(folder: Path) -> tuple[list[Result], list[str]]:
    path = folder / ROWS_FILE
    lines = _lines(path)
    results, warnings = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            # every finished line ends with a line break: a last line without one is from a run killed while writing it
            if number == len(lines):
                warnings.append(f"{source} is incomplete and skipped; {AGAIN}")
                continue
            raise ResultsError(f"{source} is not JSON", found=str(error), fix=f"delete the line; {AGAIN}") from error
        results.append(_result(folder, row, source))
    if not results:
        raise ResultsError(f"{path} has no results yet", fix="let phatgoose eval finish at least one cell")
    return results, warnings


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise ResultsError(
            f"{path.parent} is not a results folder",
            found=f"no {ROWS_FILE}",
            expected="a folder that phatgoose eval wrote",
            fix=f"phatgoose eval --pool POOL --suite t0ho --router phatgoose --out {path.parent}",
        )
    try:
        return path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ResultsError(f"{path} cannot be read", found=str(error)) from error


def _result(folder: Path, row: Any, source: str) -> Result:
    version = row.get("format") if isinstance(row, dict) else None
    if version != FORMAT:
        raise ResultsError(
            f"{source} has another format",
            found=f"format {version}",
            expected=f"format {FORMAT}",
            fix="install the phatgoose version that wrote it, or evaluate again into a new folder",
        )
    invalid = [name for name, kind in FIELDS.items() if not isinstance(row.get(name), kind)]
    if invalid:
        raise ResultsError(
            f"{source} has missing or invalid fields",
            found=", ".join(f"{name}: {row.get(name)!r}" for name in invalid),
            fix=f"delete the line; {AGAIN}",
        )
    example_ids, sums_C, counts_C = _examples(folder, row, source)
    return Result(
        **{name: row[name] for name in ("suite", "task", "method", "seed", "metric", "pool", "base", "data")},
        score=float(row["score"]),
        pool_name=str(row.get("pool_name") or row["pool"][:12]),
        **{name: row.get(name) for name in ("text", "dtype", "config")},
        example_ids=example_ids,
        sums_C=sums_C,
        counts_C=counts_C,
        source=source,
    )


def _examples(
    folder: Path, row: dict[str, Any], source: str
) -> tuple[NDArray[np.str_], NDArray[np.float64], NDArray[np.float64]]:
    """Example ids, and the sum and the number of each example's scores."""
    path = folder / row["examples"]
    fix = f"delete the row ({source}); {AGAIN}"
    # rows.jsonl may come from someone else: it may only name files in its own folder
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ResultsError(f"{source} names a file outside its folder", found=row["examples"], fix=fix)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsError(
            f"the examples of {row['suite']}/{row['task']} with {row['method']} are missing",
            found=f"no {path}",
            expected=f"the file that {source} names",
            fix=fix,
        ) from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read", found=str(error), fix=fix) from error
    ids, scores = _columns(value)
    if ids is None or scores is None or len(ids) != len(scores) or len(ids) != row["num_rows"] or not len(ids):
        raise ResultsError(
            f"{path} is damaged",
            found="not two lists" if ids is None or scores is None else f"{len(ids)} and {len(scores)}",
            expected=f"{row['num_rows']} example_ids and as many scores",
            fix=fix,
        )
    _check_scores(path, scores, row["score"], source, fix)
    unique, inverse = np.unique(ids, return_inverse=True)
    return unique, np.bincount(inverse, weights=scores).astype(np.float64), np.bincount(inverse).astype(np.float64)


def _check_scores(path: Path, scores: NDArray[np.float64], mean: float, source: str, fix: str) -> None:
    # written this way, the condition rejects NaN too
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ResultsError(f"{path} has invalid scores", expected="numbers from 0 to 1", fix=fix)
    if not abs(scores.mean() - mean) <= ROUNDING:
        raise ResultsError(
            f"{path} does not belong to its row",
            found=f"a mean of {scores.mean():.6f}",
            expected=f"{mean:.6f}, as {source} says",
            fix=fix,
        )


def _columns(value: Any) -> tuple[NDArray[np.str_] | None, NDArray[np.float64] | None]:
    if not isinstance(value, dict):
        return None, None
    ids, scores = value.get("example_ids"), value.get("scores")
    if not isinstance(ids, list) or not isinstance(scores, list):
        return None, None
    try:
        return np.array([str(name) for name in ids]), np.array(scores, dtype=np.float64).reshape(-1)
    except (TypeError, ValueError):
        return None, None
