"""All methods on one suite: averages, differences from a reference method, and their intervals.

A method's score on a suite is the macro average over the suite's tasks, where
the score on a task is the mean over seeds.

Axes: M methods, C examples, D draws.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phatgoose.config import BootstrapConfig
from phatgoose.results.bootstrap import Interval, draw_averages, over_tasks, percentiles
from phatgoose.results.names import CHANCE, uses_labels
from phatgoose.results.rows import Result

# scores that differ by less are equal: means of the same numbers in another order
TIE = 1e-9
Array = NDArray[np.float64]
# task -> the rows of a method, one per seed
RowsByTask = Mapping[str, Sequence[Result]]


@dataclass(frozen=True, kw_only=True)
class Average:
    """A method on a suite. Scores are fractions.

    Attributes:
        score: mean over the method's tasks.
        over_tasks, over_examples: intervals of `score`; None with a single
            task, or if a task has a single example.
        num_tasks: number of tasks in the mean.
        missing: tasks of the suite that the method lacks.
        uses_labels: whether it is an upper bound that uses labels or knows the
            dataset, see `names.uses_labels`.
        seeds: seeds of its rows.
        seed_sd: standard deviation between seeds of the mean over the tasks
            that have all seeds; None with one seed.
    """

    score: float
    over_tasks: Interval | None
    over_examples: Interval | None
    num_tasks: int
    missing: list[str]
    uses_labels: bool
    seeds: list[int]
    seed_sd: float | None


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A method minus the reference, on the tasks that both have. Scores are fractions."""

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
        suite: name of the suite.
        tasks: task -> metric, in the order of the tables.
        scores: method -> task -> score, without the tasks that the method lacks.
        averages: method -> average, best first.
        differences: method -> difference, without the reference; empty if the
            reference has no row of this suite.
        best: the methods with the highest average among those that use no
            labels and have all tasks.
        at_chance: tasks on which the interval over examples of no method that
            uses no labels lies above chance; None without rows of chance.
    """

    suite: str
    tasks: dict[str, str]
    scores: dict[str, dict[str, float]]
    averages: dict[str, Average]
    differences: dict[str, Difference]
    best: list[str]
    at_chance: list[str] | None


def compare_suite(suite: str, results: Sequence[Result], against: str, config: BootstrapConfig) -> SuiteComparison:
    """Compare the methods of one suite.

    Args:
        suite: name of the suite.
        results: its rows, of any methods and seeds.
        against: the reference method.
        config: settings of the bootstrap.
    """
    cells: dict[str, dict[str, list[Result]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        cells[result.method][result.task].append(result)
    tasks = dict(sorted({result.task: result.metric for result in results}.items()))
    scores = {
        method: {task: float(np.mean([row.score for row in own[task]])) for task in tasks if task in own}
        for method, own in cells.items()
    }
    own, paired, at_chance = _over_examples(list(tasks), cells, against, config)
    averages = {
        method: _average(method, scores[method], list(tasks), cells[method], own.get(method), config)
        for method in scores
    }
    averages = dict(sorted(averages.items(), key=lambda item: (-item[1].score, item[0])))
    differences = {}
    for method in scores:
        both = [task for task in scores[method] if task in scores.get(against, {})]
        if method != against and both:
            ours, theirs = (np.array([scores[name][task] for task in both]) for name in (method, against))
            our_rows, their_rows = ({task: cells[name][task] for task in both} for name in (method, against))
            differences[method] = _difference(ours, theirs, our_rows, their_rows, paired.get(method), config)
    return SuiteComparison(
        suite=suite,
        tasks=tasks,
        scores=scores,
        averages=averages,
        differences=differences,
        best=_best(averages),
        at_chance=at_chance if CHANCE in cells else None,
    )


def _average(
    method: str,
    scores: Mapping[str, float],
    tasks: Sequence[str],
    rows: RowsByTask,
    over_examples: Interval | None,
    config: BootstrapConfig,
) -> Average:
    values = list(scores.values())
    return Average(
        score=float(np.mean(values)),
        over_tasks=over_tasks(np.array(values), None, config),
        over_examples=over_examples,
        num_tasks=len(values),
        missing=[task for task in tasks if task not in scores],
        uses_labels=uses_labels(method),
        seeds=sorted({row.seed for repeated in rows.values() for row in repeated}),
        seed_sd=_sd(list(_seed_averages(rows).values())),
    )


def _difference(
    ours: Array,
    theirs: Array,
    our_rows: RowsByTask,
    their_rows: RowsByTask,
    over_examples: Interval | None,
    config: BootstrapConfig,
) -> Difference:
    our_seeds, their_seeds = _seed_averages(our_rows), _seed_averages(their_rows)
    return Difference(
        score=float(np.mean(ours - theirs)),
        over_tasks=over_tasks(ours, theirs, config),
        over_examples=over_examples,
        num_tasks=len(ours),
        wins=int(np.sum(ours - theirs > TIE)),
        losses=int(np.sum(theirs - ours > TIE)),
        ties=int(np.sum(abs(ours - theirs) <= TIE)),
        seed_sd=_sd([our_seeds[seed] - their_seeds[seed] for seed in our_seeds.keys() & their_seeds.keys()]),
    )


def _best(averages: Mapping[str, Average]) -> list[str]:
    candidates = {method: one.score for method, one in averages.items() if not one.uses_labels and not one.missing}
    return [method for method, score in candidates.items() if score > max(candidates.values()) - TIE]


def _over_examples(
    tasks: Sequence[str], cells: Mapping[str, RowsByTask], against: str, config: BootstrapConfig
) -> tuple[dict[str, Interval], dict[str, Interval], list[str]]:
    """Intervals over examples of each method's average and of its difference from `against`; tasks at chance.

    A draw of a macro average is the mean of the tasks' draws, because tasks are
    resampled independently.
    """
    rng = np.random.default_rng(config.seed)
    own, paired = _Draws(config), _Draws(config)
    at_chance = []
    for task in tasks:
        methods = [method for method, by_task in cells.items() if task in by_task]
        counts_C = cells[methods[0]][task][0].counts_C
        sums_MC = np.array([np.mean([row.sums_C for row in cells[method][task]], axis=0) for method in methods])
        # a single example says nothing about others, and then neither does the average
        averages_MD = np.full((len(methods), config.num_resamples), np.nan)
        if len(counts_C) > 1:
            averages_MD = draw_averages(sums_MC, counts_C, config, rng)
        if CHANCE in methods:
            above_MD = averages_MD - averages_MD[methods.index(CHANCE)]
            usable = [m for m, method in enumerate(methods) if method != CHANCE and not uses_labels(method)]
            if not any(percentiles(above_MD[m], config).low > 0 for m in usable):
                at_chance.append(task)
        for method, draws_D in zip(methods, averages_MD, strict=True):
            own.add(method, draws_D)
            if against in methods:
                paired.add(method, draws_D - averages_MD[methods.index(against)])
    return own.intervals(), paired.intervals(), at_chance


class _Draws:
    """Draws of each method, summed over tasks: hundreds of experts have as many tasks, too many draws to keep."""

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


def _seed_averages(rows: RowsByTask) -> dict[int, float]:
    """Macro average by seed, over the tasks that have all of the method's seeds."""
    seeds = {row.seed for repeated in rows.values() for row in repeated}
    complete = [repeated for repeated in rows.values() if {row.seed for row in repeated} == seeds]
    if not complete:
        return {}
    return {
        seed: float(np.mean([row.score for repeated in complete for row in repeated if row.seed == seed]))
        for seed in seeds
    }


def _sd(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
