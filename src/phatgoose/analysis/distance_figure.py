"""Scatter plots of the distance from the Oracle against performance."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from phatgoose.analysis.oracle_distance import AGAINST
from phatgoose.analysis.style import COLOURS, MARKERS, WIDTH
from phatgoose.analysis.summary import Analysis


def distance_figure(analysis: Analysis) -> Figure:
    """Score, score minus the Oracle's and score minus the base's against the distance; one point per task."""
    distance = analysis.distance
    assert distance is not None
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    axes = figure.subplots(1, len(AGAINST))
    suites = list(dict.fromkeys(point.suite for point in distance.points))
    uniform = float(np.log(len(analysis.header.experts)))
    middle = (min(point.kl for point in distance.points) + max(point.kl for point in distance.points)) / 2
    for axis, (field, what) in zip(axes, AGAINST.items(), strict=True):
        for i, suite in enumerate(suites):
            points = [p for p in distance.points if p.suite == suite and getattr(p, field) is not None]
            kl = [point.kl for point in points]
            y = [100 * getattr(point, field) for point in points]
            if len(analysis.seeds) > 1:
                bars = [point.kl_sd for point in points]
                axis.errorbar(kl, y, xerr=bars, fmt="none", ecolor=COLOURS[i], elinewidth=0.6, alpha=0.6)
            axis.scatter(
                kl,
                y,
                s=24,
                marker=MARKERS[i],
                color=COLOURS[i],
                edgecolor="white",
                linewidth=0.5,
                label=suite,
                zorder=3,
            )
            for point in points:
                if (suite, point.task) in analysis.heatmaps:
                    _name(axis, point.task, (point.kl, 100 * getattr(point, field)), left=point.kl < middle)
        axis.axvline(uniform, color="#777777", linewidth=0.9, linestyle=(0, (4, 2)))
        if field != "score":
            axis.axhline(0, color="#777777", linewidth=0.9)
        axis.set_xlabel("distance from the Oracle's choice, nats")
        axis.set_title(what[0].upper() + what[1:], loc="left")
        axis.set_ylabel("%" if field == "score" else "percentage points")
        axis.grid(True, color="#e4e2dc", linewidth=0.7)
        axis.margins(x=0.2)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6)
    return figure


def _name(axis: Any, text: str, place: tuple[float, float], *, left: bool) -> None:
    """Label a point on the side where there are fewer others, with a line to it."""
    label = axis.annotate(
        text,
        place,
        xytext=(-16 if left else 16, 11),
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
        fontsize=7,
        zorder=4,
        in_layout=False,
        arrowprops={"arrowstyle": "-", "linewidth": 0.7, "shrinkA": 0, "shrinkB": 2.5},
    )
    label.set_path_effects([withStroke(linewidth=2, foreground="white")])
