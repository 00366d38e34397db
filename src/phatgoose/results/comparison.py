"""Compares methods, suite by suite, from the rows of `phatgoose eval`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from phatgoose.config import BootstrapConfig
from phatgoose.errors import ResultsError
from phatgoose.results.names import BASE, CHANCE, is_expert, uses_labels
from phatgoose.results.oracle import ExpertChoice, label_oracles
from phatgoose.results.rows import Result
from phatgoose.results.suite_comparison import SuiteComparison, compare_suite


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the tables, the page and --json show.

    Attributes:
        against: the reference method.
        methods: names, in the order of the tables.
        suites: comparison of each suite, in the order of the tables.
        bases: names of base models.
        pools: names and fingerprints of pools.
        bootstrap: settings of the intervals.
        choices: experts that the label oracles chose.
        notes: what a reader should know, in sentences.
    """

    against: str
    methods: list[str]
    suites: list[SuiteComparison]
    bases: list[str]
    pools: list[str]
    bootstrap: BootstrapConfig
    choices: list[ExpertChoice] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(
    results: Sequence[Result],
    *,
    against: str = "phatgoose",
    suites: Sequence[str] | None = None,
    experts: bool = False,
    common: bool = False,
    above_chance: bool = False,
    bootstrap: BootstrapConfig | None = None,
) -> Comparison:
    """Average each method's scores, and compare them with a reference method's.

    Args:
        results: rows, as `read_results` returns them.
        against: the reference method.
        suites: suites to compare, in this order; None for all, in the order of the rows.
        experts: also list every single expert, not only the best.
        common: keep only the tasks that all methods of a suite have.
        above_chance: leave out the tasks in `SuiteComparison.at_chance`.
        bootstrap: settings of the intervals.

    Raises:
        ResultsError: an unknown suite or method, or no task is left.
    """
    config = bootstrap or BootstrapConfig()
    order = _order_of(results, suites)
    left_out: list[str] = []
    if common:
        results, left_out = _common(results, order)
    if above_chance:
        results, without = _above_chance(results, order, against, config)
        left_out += without
        order = [suite for suite in order if any(result.suite == suite for result in results)]
    oracles, choices, notes = label_oracles(result for result in results if result.suite in order)
    notes += left_out
    listed = [result for result in results if experts or not is_expert(result.method)] + oracles
    compared = [compare_suite(suite, [r for r in listed if r.suite == suite], against, config) for suite in order]
    methods = _ordered(compared)
    if against not in methods:
        raise ResultsError(
            f"no results of method {against!r} to compare with",
            found=", ".join(methods),
            fix="name one of them with --against",
        )
    notes += [f"{against} has no results on {part.suite}." for part in compared if against not in part.averages]
    notes += _uneven_seeds(listed) + _other_seeds(compared, against)
    return Comparison(
        against=against,
        methods=methods,
        suites=compared,
        bases=sorted({result.base for result in results}),
        pools=list(dict.fromkeys(f"{result.pool_name} ({result.pool[:12]})" for result in results)),
        bootstrap=config,
        choices=choices,
        notes=notes,
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """A comparison as plain data; scores are fractions. Averages that use labels are marked `told`."""
    value = asdict(comparison)
    for suite in value["suites"]:
        for average in suite["averages"].values():
            average["told"] = average.pop("uses_labels")
    return value


def _order_of(results: Iterable[Result], suites: Sequence[str] | None) -> list[str]:
    """The suites to compare. Raises ResultsError if one has no results."""
    present = list(dict.fromkeys(result.suite for result in results))
    for suite in suites or ():
        if suite not in present:
            raise ResultsError(f"no results of suite {suite!r}", found=", ".join(present), fix="leave it out")
    return list(dict.fromkeys(suites)) if suites else present


def _above_chance(
    results: Sequence[Result], suites: Sequence[str], against: str, bootstrap: BootstrapConfig
) -> tuple[list[Result], list[str]]:
    """Results of the tasks on which some method is better than chance; and notes on what was left out."""
    compared = compare(results, against=against, suites=suites, bootstrap=bootstrap).suites
    lacking = [part.suite for part in compared if part.at_chance is None]
    if lacking:
        raise ResultsError(
            f"no rows of method {CHANCE!r} on {', '.join(lacking)}",
            expected="its score on every task",
            fix=f"phatgoose eval ... --router {CHANCE}",
        )
    left_out = {part.suite: part.at_chance or [] for part in compared}
    kept = [result for result in results if result.suite in left_out and result.task not in left_out[result.suite]]
    if not kept:
        raise ResultsError(
            "no method is better than chance on any task", found=", ".join(suites), fix="leave --above-chance out"
        )
    return kept, [
        f"{suite}: without {len(tasks)} tasks on which no method is better than chance ({', '.join(tasks)})."
        for suite, tasks in left_out.items()
        if tasks
    ]


def _common(results: Sequence[Result], suites: Sequence[str]) -> tuple[list[Result], list[str]]:
    """Results of the tasks that all methods of a suite have with all their seeds; and notes on what was left out."""
    kept: list[Result] = []
    notes = []
    for suite in suites:
        rows = [result for result in results if result.suite == suite]
        runs: dict[tuple[str, int], set[str]] = {}
        for result in rows:
            runs.setdefault((result.method, result.seed), set()).add(result.task)
        shared = set.intersection(*runs.values())
        tasks = list(dict.fromkeys(result.task for result in rows))
        if not shared:
            raise ResultsError(
                f"no task of suite {suite!r} is shared by all methods",
                found=", ".join(sorted({method for method, _ in runs})),
                expected="a task that all of them have",
                fix="leave --common out",
            )
        if len(shared) < len(tasks):
            notes.append(f"{suite}: only the {len(shared)} of {len(tasks)} tasks that all methods have.")
        kept += [result for result in rows if result.task in shared]
    return kept, notes


def _ordered(suites: Iterable[SuiteComparison]) -> list[str]:
    """All methods by their mean over the suites that they have, best first; those that use labels come last."""
    scores: dict[str, list[float]] = defaultdict(list)
    for part in suites:
        for method, average in part.averages.items():
            scores[method].append(average.score)
    return sorted(scores, key=lambda method: (uses_labels(method), -float(np.mean(scores[method])), method))


def _uneven_seeds(results: Iterable[Result]) -> list[str]:
    """A sentence for each method whose tasks of a suite were not all run with the same seeds."""
    seeds: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for result in results:
        seeds[result.suite, result.method][result.task].add(result.seed)
    return [
        f"{method} on {suite} has not the same seeds for all tasks."
        for (suite, method), by_task in seeds.items()
        if len({frozenset(of_task) for of_task in by_task.values()}) > 1
    ]


def _other_seeds(suites: Iterable[SuiteComparison], against: str) -> list[str]:
    """A sentence for each suite on which some method has other seeds than the reference."""
    notes = []
    for part in suites:
        if against not in part.averages:
            continue
        seeds = part.averages[against].seeds
        # methods that use no pool are the same with every seed
        trained = {name: average for name, average in part.averages.items() if name not in (BASE, CHANCE)}
        others = [name for name, average in trained.items() if average.seeds != seeds]
        if others:
            ours = ", ".join(map(str, seeds))
            notes.append(
                f"On {part.suite} {against} has seeds {ours}, and others {', '.join(others)}:"
                " their differences are of unlike seeds."
            )
    return notes
