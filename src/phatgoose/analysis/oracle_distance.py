"""Distance of the routing from the Oracle's choice, and its correlation with performance.

    distance = KL(one-hot of the Oracle's expert || usage) = -log(usage of the Oracle's expert)

Usage is the mean routing weight over a task's tokens and all sites. The paper
(section 5, qualitative analysis) reports a Pearson correlation of -0.2 between
distance and performance, for T5-XL.

Axes: T tasks, R recordings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phatgoose.analysis.recording import Recording
from phatgoose.config import BootstrapConfig
from phatgoose.results.correlation import Correlation, correlate
from phatgoose.results.names import BASE, BEST_INDIVIDUAL, HELD_IN, ORACLE, PAPER
from phatgoose.results.oracle import label_oracles
from phatgoose.results.rows import Result

# least usage: an expert that no token chose has a distance of 9.2
FLOOR = 1e-4
PAPERS_PEARSON = -0.2
ALL = "all held-out"
# field that the distance is compared with -> its label
AGAINST = {"score": "score", "to_oracle": "score minus Oracle's", "to_base": "score minus base's"}


@dataclass(frozen=True, kw_only=True)
class DistancePoint:
    """One task, averaged over the recordings. Scores are fractions.

    Attributes:
        suite, task: names.
        experts: the Oracle's expert in each recording.
        usage: usage of the Oracle's expert.
        kl: distance in nats.
        kl_sd: its standard deviation between recordings; None with one recording.
        score: the router's score.
        to_oracle: the router's score minus the Oracle's.
        to_base: the router's score minus the base model's; None without rows of the base model.
    """

    suite: str
    task: str
    experts: list[str]
    usage: float
    kl: float
    kl_sd: float | None
    score: float
    to_oracle: float
    to_base: float | None


@dataclass(frozen=True, kw_only=True)
class OracleDistance:
    """The distance of all tasks that have the necessary results.

    Attributes:
        points: tasks, in the order of the recordings.
        correlations: suite (or `ALL` for the paper's suites together) -> field
            of `AGAINST` -> its correlation with the distance, over tasks.
    """

    points: list[DistancePoint]
    correlations: dict[str, dict[str, Correlation]]


def distance_from_oracle(
    recordings: Sequence[Recording],
    tasks: Sequence[tuple[str, str]],
    results: Sequence[Result],
    bootstrap: BootstrapConfig,
) -> tuple[OracleDistance | None, list[str]]:
    """Distances of the held-out tasks.

    Args:
        recordings: one for each repetition.
        tasks: (suite, task) pairs that all recordings have.
        results: rows of the same pools.
        bootstrap: settings of the intervals.

    Returns:
        The distances, None if no task has the necessary results; and notes on
        what is missing.
    """
    wanted = [key for key in tasks if key[0] != HELD_IN]
    scores = [_scores(one, results) for one in recordings]
    points, missing = [], []
    for key in wanted:
        parts = [_one(one, key, *known) for one, known in zip(recordings, scores, strict=True)]
        complete = [part for part in parts if part is not None]
        if len(complete) == len(parts):
            points.append(_point(key, complete))
        else:
            missing.append("/".join(key))
    notes = [_missing_note(missing, len(wanted), recordings[0].header.method)] if missing else []
    if not points:
        return None, notes
    groups = {suite: [point for point in points if point.suite == suite] for suite, _ in wanted}
    groups = {suite: group for suite, group in groups.items() if group}
    if sum(suite in groups for suite in PAPER) > 1:
        groups[ALL] = [point for point in points if point.suite in PAPER]
    correlations = {name: _correlations(group, bootstrap) for name, group in groups.items()}
    return OracleDistance(points=points, correlations=correlations), notes


def distance(usage: float) -> float:
    """Distance in nats; a usage below `FLOOR` counts as `FLOOR`."""
    return -math.log(max(usage, FLOOR))


def _missing_note(missing: Sequence[str], num_tasks: int, method: str) -> str:
    """A sentence on the tasks without a distance, and how to get it."""
    named = ", ".join([*missing[:3], *(["..."] if len(missing) > 3 else [])])
    suites = ",".join(dict.fromkeys(name.partition("/")[0] for name in missing))
    return (
        f"The distance from the Oracle is left out for {len(missing)} of {num_tasks} held-out tasks"
        f" ({named}). It needs, for each recording's pool, the scores of the router and of every single expert:"
        f" phatgoose eval --pool POOL --suite {suites}"
        f' --router "{method},base,experts" --data DIR --out RESULTS, and then phatgoose analyse ...'
        " --results RESULTS."
    )


# (suite, task) -> method -> score
TaskScores = dict[tuple[str, str], dict[str, float]]
# (suite, task) -> the Oracle's expert, and the number of experts it was chosen from
TaskOracles = dict[tuple[str, str], tuple[str, int]]


def _scores(recording: Recording, results: Sequence[Result]) -> tuple[TaskScores, TaskOracles]:
    """Scores and Oracles of a recording's pool."""
    header = recording.header
    rows = [row for row in results if row.pool == header.pool]
    if len({row.seed for row in rows}) > 1:  # one pool, evaluated more than once
        rows = [row for row in rows if row.seed == header.seed]
    rows = [row for row in rows if row.method not in (ORACLE, BEST_INDIVIDUAL)]
    made, choices, _ = label_oracles(rows)
    scores: TaskScores = {}
    for row in [*rows, *made]:
        scores.setdefault((row.suite, row.task), {})[row.method] = row.score
    oracles = {(c.suite, c.task): (c.expert, c.num_experts) for c in choices if c.method == ORACLE and c.task}
    return scores, oracles


def _one(
    recording: Recording, key: tuple[str, str], scores: TaskScores, oracles: TaskOracles
) -> tuple[str, float, float, float, float | None] | None:
    """The Oracle's expert, its usage, and the scores of router, Oracle and base; None if something is missing."""
    header, task, by_method = recording.header, recording.tasks[key], scores.get(key, {})
    expert, num_experts = oracles.get(key, ("", 0))
    if header.method not in by_method or num_experts < len(header.experts) - len(task.masked):
        return None
    usage = float(np.nanmean(task.weights_ME[:, header.experts.index(expert)]))
    return expert, usage, by_method[header.method], by_method[ORACLE], by_method.get(BASE)


def _point(key: tuple[str, str], parts: Sequence[tuple[str, float, float, float, float | None]]) -> DistancePoint:
    experts, usages, scores, oracles, bases = zip(*parts, strict=True)
    kls = [distance(usage) for usage in usages]
    score = float(np.mean(scores))
    known = [base for base in bases if base is not None]
    return DistancePoint(
        suite=key[0],
        task=key[1],
        experts=list(experts),
        usage=float(np.mean(usages)),
        kl=float(np.mean(kls)),
        kl_sd=float(np.std(kls, ddof=1)) if len(kls) > 1 else None,
        score=score,
        to_oracle=score - float(np.mean(oracles)),
        to_base=score - float(np.mean(known)) if len(known) == len(bases) else None,
    )


def _correlations(points: Sequence[DistancePoint], bootstrap: BootstrapConfig) -> dict[str, Correlation]:
    correlations = {}
    for name in AGAINST:
        pairs = [(point.kl, getattr(point, name)) for point in points if getattr(point, name) is not None]
        if len(pairs) > 1:
            x_T, y_T = np.array(pairs, dtype=np.float64).T
            correlations[name] = correlate(x_T, y_T, bootstrap)
    return correlations
