"""An analysis as matplotlib figures.

Figures are made without pyplot, which would keep a global list of them.

Axes: R recordings, T tasks, E experts, L layers, K kinds of sites.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from phatgoose.analysis.distance_figure import distance_figure
from phatgoose.analysis.heatmap import Heatmap
from phatgoose.analysis.oracle_distance import FLOOR, DistancePoint
from phatgoose.analysis.style import COLOURS, DASHES, STYLE, WIDTH
from phatgoose.analysis.suite_routing import MEASURES, SuiteRouting, spread
from phatgoose.analysis.summary import Analysis
from phatgoose.files import replacing
from phatgoose.results.names import HELD_IN, LEAVE_ONE_OUT

Array = NDArray[np.float64]
PNG_DPI = 160


@dataclass(frozen=True, kw_only=True, eq=False)
class Plot:
    """A figure with its caption.

    Attributes:
        name: name of its files, without suffix.
        section: its section of the page: "usage", "layers", "entropy", "oracle" or "similarity".
        caption: what is shown, and over what it was averaged.
        figure: the matplotlib figure.
    """

    name: str
    section: str
    caption: str
    figure: Figure


def draw(analysis: Analysis) -> list[Plot]:
    """All figures of an analysis."""
    with matplotlib.rc_context(STYLE):
        plots = [_usage(analysis, suite) for suite in analysis.suites]
        plots += _layers(analysis)
        plots += _entropies(analysis)
        plots += [_distance(analysis)] if analysis.distance else []
        return [*plots, _similarity(analysis)]


def save(plot: Plot, folder: Path) -> None:
    """Write `<name>.png` and `<name>.svg`; equal figures make equal files."""
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.name}):
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            with replacing(folder / f"{plot.name}.{kind}") as temporary:
                plot.figure.savefig(temporary, format=kind, dpi=PNG_DPI, metadata=metadata)


def remove_older(folder: Path) -> None:
    """Remove the files of an earlier run, which may have drawn other tasks."""
    for start in ("usage_", "layers_", "entropy_", "oracle_distance", "similarity"):
        for kind in ("png", "svg"):
            for path in folder.glob(f"{start}*.{kind}"):
                path.unlink()


def averaged(analysis: Analysis) -> str:
    """Over which repetitions the numbers are averaged, for captions."""
    if len(analysis.seeds) == 1:
        return "one training seed"
    return f"mean over {len(analysis.seeds)} training seeds"


def _usage(analysis: Analysis, suite: SuiteRouting) -> Plot:
    experts = list(analysis.header.experts)
    shares_TE = np.where(suite.masked_TE, np.nan, 100 * suite.usage_RTE.mean(axis=0))
    marks = "Grey: the task's own expert, which is masked."
    boxes, dots = [], []
    if suite.suite == HELD_IN:
        boxes = [(t, experts.index(task)) for t, task in enumerate(suite.tasks)]
        marks = "Boxes: the task's own expert."
    elif analysis.distance is not None:
        oracles = {point.task: point.experts for point in analysis.distance.points if point.suite == suite.suite}
        dots = [
            (t, experts.index(e)) for t, task in enumerate(suite.tasks) for e in dict.fromkeys(oracles.get(task, ()))
        ]
        said = "Circles: the expert that is best on the task (the Oracle's), for each seed."
        marks = f"{marks} {said}" if suite.suite == LEAVE_ONE_OUT else said
    elif suite.suite != LEAVE_ONE_OUT:
        marks = ""
    figure = Heatmap(
        values=shares_TE,
        rows=suite.tasks,
        columns=experts,
        title=f"{suite.suite}: which experts carry each task",
        label="mean routing weight, %",
        row_name="task",
        column_name="expert",
        boxes=boxes,
        dots=dots,
    ).figure()
    caption = (
        f"{suite.suite}. Mean routing weight of each expert, in percent; a row adds up to 100. Averaged over a row's"
        f" tokens, a task's rows and all {len(analysis.header.sites)} sites; {averaged(analysis)}. {marks}"
    )
    return Plot(name=f"usage_{suite.suite}", section="usage", caption=caption.strip(), figure=figure)


def _layers(analysis: Analysis) -> list[Plot]:
    parts = []
    for name, task in analysis.heatmaps:
        suite = analysis.suite(name)
        t = suite.tasks.index(task)
        shares_LE = 100 * suite.layers_RTLE[:, t].mean(axis=0)
        parts.append((name, task, np.where(suite.masked_TE[t], np.nan, shares_LE)))
    # one colour scale, so that tasks can be compared
    highest = max((float(np.nanmax(shares_LE)) for *_, shares_LE in parts), default=1.0)
    known = {} if analysis.distance is None else {(p.suite, p.task): p for p in analysis.distance.points}
    experts = list(analysis.header.experts)
    plots = []
    for name, task, shares_LE in parts:
        point: DistancePoint | None = known.get((name, task))
        own = [task] if name == HELD_IN else [] if point is None else sorted(set(point.experts))
        said = ""
        if name == HELD_IN:
            said = " Boxed column: its own expert."
        elif point is not None:
            said = f" Boxed: the Oracle's choice; distance from it {point.kl:.2f} nats."
        figure = Heatmap(
            values=shares_LE,
            rows=analysis.grid.layers,
            columns=experts,
            title=f"{name}/{task}: which experts carry it at each layer",
            label="mean routing weight, %",
            row_name="layer",
            column_name="expert",
            highest=highest,
            column_boxes=[experts.index(expert) for expert in own],
        ).figure()
        caption = (
            f"{name}/{task}. Mean routing weight by layer and expert, in percent, averaged over a row's tokens, the"
            f" task's rows and the kinds of sites of a layer; {averaged(analysis)}.{said}"
        )
        # a recording may come from someone else, and contain any names
        file = re.sub(r"[^\w-]", "_", f"layers_{name}_{task}")
        plots.append(Plot(name=file, section="layers", caption=caption, figure=figure))
    return plots


def _entropies(analysis: Analysis) -> list[Plot]:
    """Entropy by layer, as a fraction of the largest possible: one line per suite, and one per kind of site."""
    by_suite = {
        suite.suite: {name: np.nanmean(suite.entropies[name].share_RLK, axis=2) for name in MEASURES}
        for suite in analysis.suites
    }
    over_suites = {
        name: np.mean([suite.entropies[name].share_RLK for suite in analysis.suites], axis=0) for name in MEASURES
    }
    by_kind = {
        kind: {name: over_suites[name][:, :, k] for name in MEASURES} for k, kind in enumerate(analysis.grid.kinds)
    }
    by_kind["mean"] = {name: np.nanmean(over_suites[name], axis=2) for name in MEASURES}
    after = (
        "Each in percent of the largest possible entropy: the logarithm of the number of experts that can be"
        " chosen, or of top_k for the weights of the chosen. Averaged over a row's tokens and a task's rows (for the"
        " usage: the entropy of that average), the tasks of a suite"
    )
    between = f"; {averaged(analysis)}" + ("; bands: standard deviation between them." if _several(analysis) else ".")
    return [
        Plot(
            name="entropy_suites",
            section="entropy",
            caption=f"Entropy of the routing by layer, a line for each suite. {after} and the kinds of sites"
            f"{between} The axes differ.",
            figure=_lines(analysis, by_suite),
        ),
        Plot(
            name="entropy_kinds",
            section="entropy",
            caption=f"The same, a line for each kind of site. {after} and the suites{between} The axes differ.",
            figure=_lines(analysis, by_kind),
        ),
    ]


def _several(analysis: Analysis) -> bool:
    return len(analysis.seeds) > 1


def _lines(analysis: Analysis, lines: dict[str, dict[str, Array]]) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    axes = figure.subplots(1, len(MEASURES))
    layers = analysis.grid.layers
    x_L = np.arange(len(layers))
    for axis, (measure, what) in zip(axes, MEASURES.items(), strict=True):
        for i, (name, values) in enumerate(lines.items()):
            mean_L, sd_L = spread(values[measure])
            style: dict[str, Any] = {"color": COLOURS[i % 7], "linestyle": DASHES[i % 4], "linewidth": 1.5}
            if name == "mean":
                style = {"color": COLOURS[-1], "linestyle": "-", "linewidth": 2.4}
            axis.plot(x_L, 100 * mean_L, label=name, marker="." if len(layers) < 3 else None, **style)
            if sd_L is not None:
                low_L, high_L = 100 * (mean_L - sd_L), 100 * (mean_L + sd_L)
                axis.fill_between(x_L, low_L, high_L, color=style["color"], alpha=0.15, linewidth=0)
        axis.set_title(what, loc="left")
        axis.set_xlabel("layer")
        step = max(1, -(-len(layers) // 8))
        axis.set_xticks(x_L[::step], layers[::step], rotation=0 if max(map(len, layers)) < 4 else 90)
        axis.grid(True, color="#e4e2dc", linewidth=0.7)
        # a router that has no choice to make gives a constant
        if axis.get_ylim()[1] - axis.get_ylim()[0] < 0.1:
            middle = sum(axis.get_ylim()) / 2
            axis.set_ylim(middle - 1, middle + 1)
        axis.ticklabel_format(axis="y", useOffset=False)
    axes[0].set_ylabel("entropy, % of the largest possible")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, handlelength=3)
    return figure


def _distance(analysis: Analysis) -> Plot:
    spreads = " Bars: standard deviation between seeds." if _several(analysis) else ""
    caption = (
        "Distance of a task's usage from the Oracle's choice against the router's score: one point per task;"
        f" {averaged(analysis)}.{spreads} Dashed: the distance if all experts were used equally."
        f" A usage below {100 * FLOOR:g} % counts as that. Named: the tasks whose layers are drawn."
    )
    return Plot(name="oracle_distance", section="oracle", caption=caption, figure=distance_figure(analysis))


def _similarity(analysis: Analysis) -> Plot:
    order = analysis.similarity_order
    values_EE = analysis.similarity_EE[np.ix_(order, order)].copy()
    np.fill_diagonal(values_EE, np.nan)
    names = [analysis.header.experts[e] for e in order]
    lowest = float(np.nanmin(values_EE)) if len(order) > 1 else 0.0
    figure = Heatmap(
        values=values_EE,
        rows=names,
        columns=names,
        title="Experts that are used for the same tasks",
        label="cosine similarity of usage",
        row_name="expert",
        column_name="expert",
        lowest=np.floor(10 * lowest) / 10,
        highest=1.0,
        decimals=2,
    ).figure()
    caption = (
        "Cosine similarity of two experts' usage over all tasks (without leave-one-out if there are other suites),"
        f" sorted so that similar experts are adjacent; {averaged(analysis)}."
    )
    return Plot(name="similarity", section="similarity", caption=caption, figure=figure)
