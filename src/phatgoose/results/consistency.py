"""Whether rows belong together: the same examples and settings for every method, one pool per folder and seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from phatgoose.errors import ResultsError
from phatgoose.results.rows import Result

# fields that agree in all rows of a task, so that its methods can be compared
SHARED = ("data", "metric", "text", "dtype", "base")


def without_repeats(results: Iterable[Result]) -> list[Result]:
    """Each cell of a pool once.

    Raises:
        ResultsError: a cell occurs twice, with different scores or data.
    """
    seen: dict[tuple[Any, ...], Result] = {}
    for result in results:
        first = seen.setdefault((result.pool, *result.cell), result)
        if first.score != result.score or first.data != result.data:
            raise ResultsError(
                f"{result.suite}/{result.task} with {result.method} and seed {result.seed} was evaluated twice,"
                " with different results",
                found=f"{first.score:.4f} ({first.source}) and {result.score:.4f} ({result.source})",
                fix="delete the row that is wrong",
            )
    return list(seen.values())


def check_pools(results: Iterable[Result]) -> None:
    """Raises ResultsError unless each folder, and each seed, has one pool."""
    pools: dict[str, str] = {}
    seeds: dict[int, Result] = {}
    for result in results:
        folder = result.source.rsplit(",", 1)[0]
        if pools.setdefault(folder, result.pool) != result.pool:
            raise ResultsError(
                f"{folder} mixes two pools",
                found=f"{pools[folder][:12]} and {result.pool[:12]} ({result.source})",
                expected="one pool per folder",
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


def check_alike(results: Sequence[Result]) -> None:
    """Raises ResultsError unless rows that will be compared have the same examples, settings and base model."""
    tasks: dict[tuple[str, str], Result] = {}
    methods: dict[tuple[str, str], Result] = {}
    for result in results:
        _check_task(tasks.setdefault((result.suite, result.task), result), result)
        _check_method(methods.setdefault((result.suite, result.method), result), result)


def _check_task(first: Result, result: Result) -> None:
    """Raises ResultsError unless two rows of a task can be paired example by example."""
    unequal = [name for name in SHARED if getattr(first, name) != getattr(result, name)]
    paired = all(np.array_equal(getattr(first, name), getattr(result, name)) for name in ("example_ids", "counts_C"))
    if not unequal and not paired:
        unequal = ["example_ids"]
    if unequal:
        raise ResultsError(
            f"{result.suite}/{result.task} was not evaluated in the same way for all methods",
            found=f"different {', '.join(unequal)} for {first.method} ({first.source}) and {result.method}"
            f" ({result.source})",
            expected="the same examples, metric, settings and base model for every method",
            fix="evaluate one of them again, with the settings of the other",
        )


def _check_method(first: Result, result: Result) -> None:
    """Raises ResultsError unless two rows of a method have the same settings."""
    if _settings(first, result.pool) != _settings(result, first.pool):
        raise ResultsError(
            f"{result.method} has different settings within {result.suite}",
            found=f"{first.config} ({first.source}) and {result.config} ({result.source})",
            expected="the same settings for all tasks and seeds",
            fix="evaluate the tasks again with the same settings",
        )


def _settings(result: Result, other_pool: str) -> Any:
    """The settings in which a row must agree with another row of its method, in the pool `other_pool`."""
    if result.pool == other_pool or not isinstance(result.config, dict):
        return result.config
    # multitask routes in a pool of its own, which is trained anew for each seed like the others
    return {name: value for name, value in result.config.items() if name != "pool"}
