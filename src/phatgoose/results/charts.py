"""Geometry of the comparison page's charts: where points, intervals, ticks and labels are drawn.

The charts are boxes placed by CSS and a few SVG lines, so they follow the
reader's colours, font and width, and their numbers can be searched and copied.
All positions are in percent of the length of an axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phatgoose.report.tables import percent
from phatgoose.results.bootstrap import Interval
from phatgoose.results.comparison import Comparison
from phatgoose.results.names import HELD_IN, is_expert
from phatgoose.results.suite_comparison import Average, Difference, SuiteComparison
from phatgoose.results.tables import limits, marked

# least distance of two labels in the scatter plot, in percent of its side: on a phone, a label is 21 of 250 pixels wide
APART = 8.5


@dataclass(frozen=True)
class Axis:
    """A linear axis from `low` to `high` with a tick every `step`; positions are in percent of its length."""

    low: float
    high: float
    step: float

    @classmethod
    def around(cls, values: Sequence[float], num_ticks: int = 5) -> Axis:
        """The axis that covers all values; its ends are ticks, spaced 1, 2 or 5 times a power of ten."""
        low, high = min(values), max(values)
        rough = max(high - low, 0.01) / num_ticks
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * times for times in (1, 2, 5, 10) if rough <= power * times * (1 + 1e-9))
        start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        return cls(start * step, max(end, start + 1) * step, step)

    def at(self, value: float) -> float:
        """Position of a value."""
        return round(100 * (value - self.low) / (self.high - self.low), 3)

    def ticks(self, sign: bool = False) -> list[dict[str, Any]]:
        """Position and label of each tick; labels are values in percent."""
        first = round(self.low / self.step)
        digits = 0 if 100 * self.step >= 1 else 1
        numbers = range(first, first + round((self.high - self.low) / self.step) + 1)
        # a narrow window has room for every second label: the even ones, with zero among them
        return [
            {
                "at": self.at(i * self.step),
                "text": percent(i * self.step, sign, digits),
                "zero": i == 0,
                "second": i % 2 == 1,
            }
            for i in numbers
        ]


def dots(
    suite: SuiteComparison,
    values: dict[str, Average] | dict[str, Difference],
    methods: Sequence[str],
    zero: bool = False,
) -> dict[str, Any] | None:
    """A dot with its two intervals for each method; None if there is nothing to draw."""
    drawn = [(method, values[method]) for method in methods if method in values]
    if not drawn:
        return None
    ends = [end for _, v in drawn for i in (v.over_tasks, v.over_examples) if i for end in (i.low, i.high)]
    axis = Axis.around([*ends, *(v.score for _, v in drawn), *([0.0] if zero else [])])
    rows = [
        {
            "name": marked(method, suite.averages[method]),
            "at": axis.at(value.score),
            "text": percent(value.score, sign=zero),
            "title": f"{method}: {percent(value.score, sign=zero)}, over examples {limits(value.over_examples)},"
            f" over tasks {limits(value.over_tasks)}",
            "tasks": _whisker(axis, value.over_tasks),
            "examples": _whisker(axis, value.over_examples),
            "told": suite.averages[method].uses_labels,
            "best": method in suite.best,
        }
        for method, value in drawn
    ]
    return {"rows": rows, "ticks": axis.ticks(sign=zero)}


def _whisker(axis: Axis, interval: Interval | None) -> dict[str, float] | None:
    if interval is None:
        return None
    return {"at": axis.at(interval.low), "width": round(axis.at(interval.high) - axis.at(interval.low), 3)}


def heat(comparison: Comparison, suite: SuiteComparison) -> dict[str, Any] | None:
    """Method minus reference on each task; the tasks are rows, because their names are long."""
    reference = suite.scores.get(comparison.against)
    methods = [method for method in comparison.methods if method in suite.differences]
    if reference is None or not methods:
        return None
    differences = {
        (task, method): suite.scores[method][task] - reference[task]
        for task in suite.tasks
        for method in methods
        if task in reference and task in suite.scores[method]
    }
    # the top twentieth gets the strongest tint: otherwise one outlier would leave the others pale
    full = max(0.01, float(np.quantile(np.abs(list(differences.values())), 0.95)))
    rows = []
    for task in suite.tasks:
        cells: list[dict[str, Any] | None] = []
        for method in methods:
            value = differences.get((task, method))
            if value is None:
                cells.append(None)
                continue
            title = f"{task}, {method}: {percent(suite.scores[method][task])} against {percent(reference[task])}"
            strength = round(100 * min(1.0, abs(value) / full), 1)
            cells.append({"text": percent(value, sign=True), "strength": strength, "up": value > 0, "title": title})
        rows.append({"task": task, "cells": cells})
    heads = [{"name": method, "mark": marked("", suite.averages[method])} for method in methods]
    return {"methods": heads, "rows": rows, "full": percent(full)}


def scatters(comparison: Comparison) -> list[dict[str, Any]]:
    """Held-in against each other suite: one point for each method that has all tasks of both."""
    held_in = next((suite for suite in comparison.suites if suite.suite == HELD_IN), None)
    if held_in is None:
        return []
    charts = []
    for suite in comparison.suites:
        both = [m for m in comparison.methods if m in held_in.averages and m in suite.averages and not is_expert(m)]
        short = [method for method in both if held_in.averages[method].missing or suite.averages[method].missing]
        drawn = [method for method in both if method not in short]
        if suite is not held_in and drawn:
            charts.append(_scatter(comparison, held_in, suite, drawn) | {"left_out": short})
    return charts


def _scatter(
    comparison: Comparison, held_in: SuiteComparison, suite: SuiteComparison, methods: Sequence[str]
) -> dict[str, Any]:
    x, y = ([part.averages[method].score for method in methods] for part in (held_in, suite))
    axis_x, axis_y = Axis.around(x, 4), Axis.around(y, 4)
    exact = [(axis_x.at(a), axis_y.at(b)) for a, b in zip(x, y, strict=True)]
    points = [
        {
            "x": exact[i][0],
            "y": exact[i][1],
            "label_x": label[0],
            "label_y": label[1],
            "number": comparison.methods.index(method) + 1,
            "name": marked(method, suite.averages[method]),
            "told": suite.averages[method].uses_labels,
            "title": f"{method}: {HELD_IN} {percent(x[i])}, {suite.suite} {percent(y[i])}",
        }
        for i, (method, label) in enumerate(zip(methods, spread(exact), strict=True))
    ]
    return {"suite": suite.suite, "points": points, "x": axis_x.ticks(), "y": axis_y.ticks()}


def spread(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Positions of labels near their points, moved until no two are closer than `APART`."""
    places = np.array(points, dtype=np.float64)
    # points that coincide need a direction in which to move apart
    angles = 2.4 * np.arange(len(places))
    directions = 0.01 * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    for _ in range(500):
        apart = places[:, None] - places[None] + directions[:, None] - directions[None]
        distances = np.linalg.norm(apart, axis=-1) + 1000 * np.eye(len(places))
        if distances.min() >= APART:
            break
        push = np.clip(1.05 * APART - distances, 0, None) / 2
        places += (apart / distances[..., None] * push[..., None]).sum(axis=1)
        places = places.clip(APART / 2, 100 - APART / 2)
    return [(round(float(x), 2), round(float(y), 2)) for x, y in places]
