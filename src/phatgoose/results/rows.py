"""What `phatgoose eval` wrote, read back and checked.

A results folder holds `rows.jsonl`, one finished cell (suite, task, method,
seed) a line, and the scores of each cell's examples in a file that the line
names. Several folders are read together if they are of pools trained with
different seeds. A folder may be packed as a tar archive: thousands of small
files about the same examples then take a fiftieth of the room.

Axes: C examples.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phatgoose.errors import ResultsError

ROWS_FILE = "rows.jsonl"
FORMAT = 1
# What a score may lose between the mean of the examples and the row.
ROUNDING = 1e-6
# In which all rows of a task agree, so that its methods can be compared.
SHARED = ("data", "metric", "text", "dtype", "base")
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


@dataclass(frozen=True, kw_only=True, eq=False)
class Result:
    """One cell: a method on a task, with one seed.

    Attributes:
        suite, task, method, seed: what was evaluated.
        metric: what a row's score is, such as "accuracy"; between 0 and 1.
        score: mean over the rows.
        pool: fingerprint of the pool; `pool_name` is for people.
        base: the base model.
        data: checksum of the evaluated rows.
        text: settings by which examples became tokens.
        dtype: of the base model's weights.
        config: the router's settings.
        example_ids: of the C examples, sorted. A row is one rendering of an
            example; an example may have several.
        sums_C: sum of the scores of an example's rows.
        counts_C: number of an example's rows.
        source: file and line, for messages.
    """

    suite: str
    task: str
    method: str
    seed: int
    metric: str
    score: float
    pool: str
    pool_name: str
    base: str
    data: str
    text: Any
    dtype: Any
    config: Any
    example_ids: NDArray[np.str_]
    sums_C: NDArray[np.float64]
    counts_C: NDArray[np.float64]
    source: str

    @property
    def cell(self) -> tuple[str, str, str, int]:
        """What no two rows of one pool may share."""
        return self.suite, self.task, self.method, self.seed


def read_results(folders: Sequence[str | Path]) -> tuple[list[Result], list[str]]:
    """Read one or more results folders.

    Args:
        folders: each of one pool, or a .tar, .tar.gz or .tar.xz of one. Different
            pools must have different seeds: they count as repetitions of one experiment.

    Returns:
        The cells, in the order of the files, and what a user should be told
        (a torn last line).

    Raises:
        ResultsError: a folder without results, a damaged or newer file, rows
            of one task that do not belong together, two pools in one folder.
    """
    results: list[Result] = []
    warnings: list[str] = []
    for path in dict.fromkeys(Path(folder) for folder in folders):
        with _unpacked(path) as folder:
            found, torn = _read_folder(folder)
        results += found
        warnings += torn
    results = _without_repeats(results)
    _check_pools(results)
    _check_alike(results)
    return results, warnings


@contextmanager
def _unpacked(path: Path) -> Iterator[Path]:
    """A results folder as it is, or out of an archive."""
    if not path.name.endswith((".tar", ".tar.gz", ".tar.xz")):
        yield path
        return
    with TemporaryDirectory() as temporary:
        try:
            with tarfile.open(path) as archive:
                # under the archive's name, which messages then have
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
    if not path.is_file():
        raise ResultsError(
            f"{folder} is no results folder",
            found=f"no {ROWS_FILE}",
            expected="a folder that phatgoose eval wrote",
            fix=f"phatgoose eval --pool POOL --suite t0ho --router phatgoose --out {folder}",
        )
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise ResultsError(f"{path} cannot be read", found=str(error)) from error
    results, warnings = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        source = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            # every finished line ends with a line break: the last one without is from a run that was killed in it
            if number == len(lines):
                warnings.append(f"{source} is torn and left out; the same phatgoose eval again makes that cell")
                continue
            raise ResultsError(
                f"{source} is not JSON",
                found=str(error),
                fix="take the line out; the same phatgoose eval again makes that cell",
            ) from error
        results.append(_result(folder, row, source))
    if not results:
        raise ResultsError(f"{path} holds no result yet", fix="let phatgoose eval finish at least one cell")
    return results, warnings


def _result(folder: Path, row: Any, source: str) -> Result:
    found = row.get("format") if isinstance(row, dict) else None
    if found != FORMAT:
        raise ResultsError(
            f"{source} has another format",
            found=f"format {found}",
            expected=f"format {FORMAT}",
            fix="install the phatgoose that wrote it, or evaluate again into a new folder",
        )
    wrong = [name for name, kind in FIELDS.items() if not isinstance(row.get(name), kind)]
    if wrong:
        raise ResultsError(
            f"{source} lacks fields, or they have another type",
            found=", ".join(f"{name}: {row.get(name)!r}" for name in wrong),
            fix="take the line out; the same phatgoose eval again makes that cell",
        )
    example_ids, sums, counts = _examples(folder, row, source)
    return Result(
        **{name: row[name] for name in ("suite", "task", "method", "seed", "metric", "pool", "base", "data")},
        score=float(row["score"]),
        pool_name=str(row.get("pool_name") or row["pool"][:12]),
        **{name: row.get(name) for name in ("text", "dtype", "config")},
        example_ids=example_ids,
        sums_C=sums,
        counts_C=counts,
        source=source,
    )


def _examples(
    folder: Path, row: dict[str, Any], source: str
) -> tuple[NDArray[np.str_], NDArray[np.float64], NDArray[np.float64]]:
    path = folder / row["examples"]
    again = f"delete the row ({source}); the same phatgoose eval again makes that cell"
    # rows.jsonl may come from someone else: it names files of its own folder, no others
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ResultsError(f"{source} names a file outside its folder", found=row["examples"], fix=again)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ResultsError(
            f"the examples of {row['suite']}/{row['task']} with {row['method']} are missing",
            found=f"no {path}",
            expected=f"the file that {source} names",
            fix=again,
        ) from error
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read", found=str(error), fix=again) from error
    ids, scores = _columns(value)
    if ids is None or scores is None or len(ids) != len(scores) or len(ids) != row["num_rows"] or not len(ids):
        raise ResultsError(
            f"{path} is damaged",
            found="no two lists of one length" if ids is None or scores is None else f"{len(ids)} and {len(scores)}",
            expected=f"{row['num_rows']} example_ids and as many scores",
            fix=again,
        )
    # so written, NaN is refused too
    if not ((scores >= 0) & (scores <= 1)).all():
        raise ResultsError(f"{path} has scores that are none", expected="numbers from 0 to 1", fix=again)
    if not abs(scores.mean() - row["score"]) <= ROUNDING:
        raise ResultsError(
            f"{path} does not belong to its row",
            found=f"a mean of {scores.mean():.6f}",
            expected=f"{row['score']:.6f}, as {source} says",
            fix=again,
        )
    unique, inverse = np.unique(ids, return_inverse=True)
    return unique, np.bincount(inverse, weights=scores).astype(np.float64), np.bincount(inverse).astype(np.float64)


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


def _without_repeats(results: Iterable[Result]) -> list[Result]:
    """Each cell of a pool once; the same cell with another score is an error."""
    seen: dict[tuple[Any, ...], Result] = {}
    for result in results:
        first = seen.setdefault((result.pool, *result.cell), result)
        if first.score != result.score or first.data != result.data:
            raise ResultsError(
                f"{result.suite}/{result.task} with {result.method} and seed {result.seed} was evaluated twice,"
                " differently",
                found=f"{first.score:.4f} ({first.source}) and {result.score:.4f} ({result.source})",
                fix="take out the row that is not wanted",
            )
    return list(seen.values())


def _check_pools(results: Sequence[Result]) -> None:
    pools: dict[str, str] = {}
    seeds: dict[int, Result] = {}
    for result in results:
        folder = result.source.rsplit(",", 1)[0]
        if pools.setdefault(folder, result.pool) != result.pool:
            raise ResultsError(
                f"{folder} mixes two pools",
                found=f"{pools[folder][:12]} and {result.pool[:12]} ({result.source})",
                expected="one pool a folder",
                fix="evaluate each pool into a folder of its own (phatgoose eval --out)",
            )
        first = seeds.setdefault(result.seed, result)
        if first.pool != result.pool:
            raise ResultsError(
                "results of two pools with the same seed cannot be averaged",
                found=f"seed {result.seed} in {first.source} (pool {first.pool_name})"
                f" and in {result.source} (pool {result.pool_name})",
                expected="one pool, or the same pool trained with different seeds",
                fix="compare each pool on its own; for repetitions, give each its --seed in phatgoose eval",
            )


def _check_alike(results: Sequence[Result]) -> None:
    """Rows that will be compared were made from the same examples, prompts and base model."""
    tasks: dict[tuple[str, str], Result] = {}
    methods: dict[tuple[str, str], Result] = {}
    for result in results:
        first = tasks.setdefault((result.suite, result.task), result)
        odd = [name for name in SHARED if getattr(first, name) != getattr(result, name)]
        same = all(np.array_equal(getattr(first, name), getattr(result, name)) for name in ("example_ids", "counts_C"))
        if not odd and not same:
            odd = ["example_ids"]
        if odd:
            raise ResultsError(
                f"{result.suite}/{result.task} was not evaluated alike for all methods",
                found=f"another {', '.join(odd)} of {first.method} ({first.source}) than of {result.method}"
                f" ({result.source})",
                expected="the same examples, metric, settings and base model for every method",
                fix="evaluate one of them again, as the other was",
            )
        first = methods.setdefault((result.suite, result.method), result)
        if _settings(first, result.pool) != _settings(result, first.pool):
            raise ResultsError(
                f"{result.method} has different settings within {result.suite}",
                found=f"{first.config} ({first.source}) and {result.config} ({result.source})",
                expected="one setting for all tasks and seeds",
                fix="evaluate the tasks again with one setting",
            )


def _settings(result: Result, other_pool: str) -> Any:
    """What must not differ between two rows of a method."""
    if result.pool == other_pool or not isinstance(result.config, dict):
        return result.config
    # Multitask routes in a pool of its own, which is trained anew for each seed as the others are
    return {name: value for name, value in result.config.items() if name != "pool"}
