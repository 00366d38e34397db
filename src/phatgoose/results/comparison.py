"""Methods against each other, suite by suite, from the rows of `phatgoose eval`.

A method's score on a suite is the macro average over the suite's tasks. Seeds
are averaged within a task first; how far apart they are is told beside it.

Axes: M methods, C examples, D draws.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from phatgoose.config import BootstrapConfig
from phatgoose.errors import ResultsError
from phatgoose.results.bootstrap import Interval, draw_averages, over_tasks, percentiles
from phatgoose.results.names import BASE, CHANCE, is_expert, is_told
from phatgoose.results.oracle import Choice, label_readers
from phatgoose.results.rows import Result

# Scores that differ by less are a tie: means of the same numbers in another order do.
TIE = 1e-9
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Average:
    """A method on a suite. Scores are shares of 1.

    Attributes:
        score: mean over the tasks that the method has.
        over_tasks, over_examples: intervals of `score`; None if there is only
            one task, or only one example in a task.
        num_tasks: that the mean stands on.
        missing: tasks of the suite that the method lacks.
        told: it reads the labels or knows the dataset; not a method to use.
        seeds: that it was evaluated with.
        seed_sd: standard deviation between seeds of the mean over the tasks
            that have all of them; None with one seed.
    """

    score: float
    over_tasks: Interval | None
    over_examples: Interval | None
    num_tasks: int
    missing: list[str]
    told: bool
    seeds: list[int]
    seed_sd: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method minus the reference, on the tasks that both have."""

    score: float
    over_tasks: Interval | None
    over_examples: Interval | None
    num_tasks: int
    wins: int
    losses: int
    ties: int
    seed_sd: float | None


@dataclass(frozen=True, kw_only=True)
class SuiteComparison:
    """All methods on one suite.

    Attributes:
        tasks: in the order of the table, each with its metric.
        scores: method -> task -> score, without the tasks that it lacks.
        averages: by method, the best first.
        differences: by method, the reference left out; empty if the reference
            has no row of this suite.
        best: the methods that are `realisable` with the highest average among
            those that have all tasks.
        at_chance: tasks on which no method that can be used is better than
            chance, by its interval over examples; None without rows of chance.
    """

    suite: str
    tasks: dict[str, str]
    scores: dict[str, dict[str, float]]
    averages: dict[str, Average]
    differences: dict[str, Difference]
    best: list[str]
    at_chance: list[str] | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the tables, the page and --json show."""

    against: str
    methods: list[str]
    suites: list[SuiteComparison]
    bases: list[str]
    pools: list[str]
    bootstrap: BootstrapConfig
    choices: list[Choice] = field(default_factory=list)
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
    """Average, compare, and say how sure that is.

    Args:
        results: as `read_results` returns them.
        against: the method that the others are compared with.
        suites: in this order; all, in the order of the rows, if None.
        experts: also list every single expert, not only the best.
        common: only tasks that all methods of a suite have.
        above_chance: without the tasks in `SuiteComparison.at_chance`.
        bootstrap: of the intervals.

    Raises:
        ResultsError: no such suite, or no such method.
    """
    config = bootstrap or BootstrapConfig()
    present = list(dict.fromkeys(result.suite for result in results))
    for suite in suites or ():
        if suite not in present:
            raise ResultsError(f"no results of suite {suite!r}", found=", ".join(present), fix="leave it out")
    order = list(dict.fromkeys(suites)) if suites else present
    left_out: list[str] = []
    if common:
        results, left_out = _common(results, order)
    if above_chance:
        results, more = _above_chance(results, order, against, config)
        left_out += more
        order = [suite for suite in order if any(result.suite == suite for result in results)]
    derived, choices, notes = label_readers(result for result in results if result.suite in order)
    notes += left_out
    shown = [result for result in results if experts or not is_expert(result.method)] + derived
    compared = [_suite(suite, [r for r in shown if r.suite == suite], against, config) for suite in order]
    methods = _ordered(compared)
    if against not in methods:
        raise ResultsError(
            f"no results of method {against!r} to compare with",
            found=", ".join(methods),
            fix="name one of them with --against",
        )
    notes += [f"{against} has no results on {part.suite}." for part in compared if against not in part.averages]
    notes += _uneven_seeds(shown) + _other_seeds(compared, against)
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


def _above_chance(
    results: Sequence[Result], suites: Sequence[str], against: str, bootstrap: BootstrapConfig
) -> tuple[list[Result], list[str]]:
    """Results of the tasks on which some method is better than chance; and what was left out, in words."""
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
    """Results of the tasks that each of a suite's methods has in all of its seeds; and what was left out, in words."""
    kept: list[Result] = []
    notes = []
    for suite in suites:
        found = [result for result in results if result.suite == suite]
        runs: dict[tuple[str, int], set[str]] = {}
        for result in found:
            runs.setdefault((result.method, result.seed), set()).add(result.task)
        shared = set.intersection(*runs.values())
        tasks = list(dict.fromkeys(result.task for result in found))
        missing = [task for task in tasks if task not in shared]
        if not shared:
            raise ResultsError(
                f"no task of suite {suite!r} is shared by all methods",
                found=", ".join(sorted({method for method, _ in runs})),
                expected="a task that all of them have",
                fix="leave --common out",
            )
        if missing:
            notes.append(f"{suite}: only the {len(shared)} of {len(tasks)} tasks that all methods have.")
        kept += [result for result in found if result.task in shared]
    return kept, notes


def _suite(suite: str, results: Sequence[Result], against: str, config: BootstrapConfig) -> SuiteComparison:
    cells: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cells[result.method][result.task].append(result)
    tasks = dict(sorted({result.task: result.metric for result in results}.items()))
    scores = {
        method: {task: float(np.mean([cell.score for cell in cells[method][task]])) for task in tasks if task in own}
        for method, own in cells.items()
    }
    by_examples, differences_by_examples, at_chance = _over_examples(list(tasks), cells, against, config)
    averages = {}
    differences = {}
    for method, own in scores.items():
        seeds = _seed_averages(cells[method])
        averages[method] = Average(
            score=float(np.mean(list(own.values()))),
            over_tasks=over_tasks(np.array(list(own.values())), None, config),
            over_examples=by_examples.get(method),
            num_tasks=len(own),
            missing=[task for task in tasks if task not in own],
            told=is_told(method),
            seeds=sorted({cell.seed for row in cells[method].values() for cell in row}),
            seed_sd=_sd(list(seeds.values())),
        )
        both = [task for task in own if task in scores.get(against, {})]
        if method == against or not both:
            continue
        ours, theirs = (np.array([scores[name][task] for task in both]) for name in (method, against))
        pairs = [_seed_averages({task: cells[name][task] for task in both}) for name in (method, against)]
        differences[method] = Difference(
            score=float(np.mean(ours - theirs)),
            over_tasks=over_tasks(ours, theirs, config),
            over_examples=differences_by_examples.get(method),
            num_tasks=len(both),
            wins=int(np.sum(ours - theirs > TIE)),
            losses=int(np.sum(theirs - ours > TIE)),
            ties=int(np.sum(abs(ours - theirs) <= TIE)),
            seed_sd=_sd([pairs[0][seed] - pairs[1][seed] for seed in pairs[0].keys() & pairs[1].keys()]),
        )
    averages = dict(sorted(averages.items(), key=lambda item: (-item[1].score, item[0])))
    fair = {method: value.score for method, value in averages.items() if not value.told and not value.missing}
    best = [method for method, score in fair.items() if score > max(fair.values()) - TIE]
    return SuiteComparison(
        suite=suite,
        tasks=tasks,
        scores=scores,
        averages=averages,
        differences=differences,
        best=best,
        at_chance=at_chance if CHANCE in cells else None,
    )


def _over_examples(
    tasks: Sequence[str], cells: dict[str, dict[str, list[Result]]], against: str, config: BootstrapConfig
) -> tuple[dict[str, Interval], dict[str, Interval], list[str]]:
    """Intervals over examples of each method's average and of its difference from `against`; tasks at chance.

    Draws of a macro average are means of the tasks' draws, because tasks are
    resampled each on its own.
    """
    rng = np.random.default_rng(config.seed)
    own, paired = _Totals(config), _Totals(config)
    at_chance = []
    for task in tasks:
        methods = [method for method, by_task in cells.items() if task in by_task]
        counts_C = cells[methods[0]][task][0].counts_C
        sums_MC = np.array([np.mean([cell.sums_C for cell in cells[method][task]], axis=0) for method in methods])
        # one example says nothing about others, and then neither does the average
        averages_MD = np.full((len(methods), config.num_resamples), np.nan)
        if len(counts_C) > 1:
            averages_MD = draw_averages(sums_MC, counts_C, config, rng)
        if CHANCE in methods:
            above_MD = averages_MD - averages_MD[methods.index(CHANCE)]
            usable = [m for m, method in enumerate(methods) if method != CHANCE and not is_told(method)]
            if not any(percentiles(above_MD[m], config).low > 0 for m in usable):
                at_chance.append(task)
        for method, draws_D in zip(methods, averages_MD, strict=True):
            own.add(method, draws_D)
            if against in methods:
                paired.add(method, draws_D - averages_MD[methods.index(against)])
    return own.intervals(), paired.intervals(), at_chance


class _Totals:
    """Draws of each method summed over tasks: a pool of hundreds of experts has as many tasks and methods."""

    def __init__(self, config: BootstrapConfig) -> None:
        self.config = config
        self.sums: dict[str, Array] = {}
        self.num_tasks: Counter[str] = Counter()

    def add(self, method: str, draws_D: Array) -> None:
        self.sums[method] = self.sums.get(method, 0.0) + draws_D
        self.num_tasks[method] += 1

    def intervals(self) -> dict[str, Interval]:
        means = {method: sum_D / self.num_tasks[method] for method, sum_D in self.sums.items()}
        return {
            method: percentiles(mean_D, self.config) for method, mean_D in means.items() if not np.isnan(mean_D).any()
        }


def _seed_averages(cells: dict[str, list[Result]]) -> dict[int, float]:
    """Macro average by seed, over the tasks that have all of the method's seeds."""
    seeds = {cell.seed for row in cells.values() for cell in row}
    complete = [row for row in cells.values() if {cell.seed for cell in row} == seeds]
    if not complete:
        return {}
    return {
        seed: float(np.mean([cell.score for row in complete for cell in row if cell.seed == seed])) for seed in seeds
    }


def _other_seeds(suites: Iterable[SuiteComparison], against: str) -> list[str]:
    """A sentence for each suite on which methods have other seeds than the one that they are compared with."""
    notes = []
    for part in suites:
        if against not in part.averages:
            continue
        seeds = part.averages[against].seeds
        # what knows no pool is the same with every seed
        trained = {name: average for name, average in part.averages.items() if name not in (BASE, CHANCE)}
        others = [name for name, average in trained.items() if average.seeds != seeds]
        if others:
            ours = ", ".join(map(str, seeds))
            notes.append(
                f"On {part.suite} {against} has seeds {ours}, and others {', '.join(others)}:"
                " their differences are of unlike seeds."
            )
    return notes


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _ordered(suites: Iterable[SuiteComparison]) -> list[str]:
    """Methods that can be used first, each kind by its mean over the suites that it has."""
    scores: dict[str, list[float]] = defaultdict(list)
    for part in suites:
        for method, average in part.averages.items():
            scores[method].append(average.score)
    return sorted(scores, key=lambda method: (is_told(method), -float(np.mean(scores[method])), method))


def _uneven_seeds(results: Iterable[Result]) -> list[str]:
    """A sentence for each method whose tasks of a suite were not all run with the same seeds."""
    seeds: dict[tuple[str, str], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for result in results:
        seeds[result.suite, result.method][result.task].add(result.seed)
    return [
        f"{method} on {suite} has not the same seeds for all tasks."
        for (suite, method), by_task in seeds.items()
        if len({frozenset(found) for found in by_task.values()}) > 1
    ]
