"""An analysis as tables, Markdown and JSON.

In tables, weights, scores and shares are in percent, differences in percentage
points, and entropies in nats too. In JSON, all of them are fractions.

Axes: R recordings, T tasks, E experts, L layers, K kinds of sites.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from phatgoose.analysis.oracle_distance import AGAINST, ALL, FLOOR, PAPERS_PEARSON
from phatgoose.analysis.suite_routing import MEASURES, SuiteRouting, entropy, spread
from phatgoose.analysis.summary import Analysis
from phatgoose.report.tables import MINUS, NOTHING, Table, TableCell, markdown_lines, percent
from phatgoose.results.bootstrap import Interval

Array = NDArray[np.float64]
# decimals of numbers in JSON
DECIMALS = 5
SHORT = {"scores": "all scores", "chosen": "chosen", "usage": "usage"}
_ENTROPY_NOTE = (
    "Entropy in nats, and as % of the largest possible: of the softmax over all experts' scores and of the chosen"
    " experts' weights, each a mean over tokens; and of the task's usage at a site, a mean over tasks."
)


def all_tables(analysis: Analysis) -> list[Table]:
    """All tables, in the order of the page."""
    return [
        overview(analysis),
        *([own_shares(analysis)] if analysis.own else []),
        *(leaders(analysis, suite) for suite in analysis.suites),
        entropies(analysis, "kind"),
        entropies(analysis, "layer"),
        *([correlations(analysis), distances(analysis)] if analysis.distance else []),
    ]


def overview(analysis: Analysis) -> Table:
    """One row per suite: entropies, and experts in use."""
    rows = []
    for suite in analysis.suites:
        row = [TableCell(suite.suite), TableCell(str(len(suite.tasks)))]
        row += _entropy_cells([suite], lambda values_RLK: np.nanmean(values_RLK, axis=(1, 2)))
        # from the usage over all sites, which the heat map of tasks and experts shows
        row.append(TableCell(_number(*spread(np.exp(entropy(suite.usage_RTE)).mean(axis=1)), digits=1)))
        rows.append(row)
    notes = [
        _ENTROPY_NOTE,
        "Experts in use: the exponential of the entropy of a task's usage over all sites, a mean over tasks; the number"
        " of experts that would have that entropy if they were used equally.",
        *_sd_note(analysis),
    ]
    head = ["suite", "tasks", *_entropy_head(), "experts in use"]
    return _table("Suites", head, rows, notes, texts=1)


def own_shares(analysis: Analysis) -> Table:
    """One row per held-in task: the share of its own expert."""
    rows = [
        [
            TableCell(one.task),
            TableCell(_percent(one.share, one.share_sd), bold=one.rank == 1),
            TableCell(str(one.rank)),
            TableCell("" if one.rank == 1 else one.leader),
            TableCell("" if one.rank == 1 else percent(one.leader_share)),
        ]
        for one in analysis.own
    ]
    first = sum(one.rank == 1 for one in analysis.own)
    mean = float(np.mean([one.share for one in analysis.own]))
    notes = [
        f"Mean routing weight of the task's own expert, in %. Mean over the tasks: {percent(mean)}; an equal use of all"
        f" experts would be {percent(1 / len(analysis.header.experts))}. The own expert leads in {first} of"
        f" {len(analysis.own)} tasks (bold).",
        *_sd_note(analysis),
    ]
    return _table(
        "Share of the own expert",
        ["task", "own expert", "rank", "leader, if another", "its share"],
        rows,
        notes,
        (0, 3),
    )


def leaders(analysis: Analysis, suite: SuiteRouting) -> Table:
    """One row per task: the three experts with the largest weights."""
    rows = []
    for t, task in enumerate(suite.tasks):
        mean_E, sd_E = spread(suite.usage_RTE[:, t])
        best = np.argsort(-mean_E, kind="stable")[:3]
        texts = [f"{analysis.header.experts[e]} {_percent(mean_E[e], None if sd_E is None else sd_E[e])}" for e in best]
        texts += [NOTHING] * (3 - len(texts))
        in_use = _number(*spread(np.exp(entropy(suite.usage_RTE[:, t]))), digits=1)
        rows.append([TableCell(task), *map(TableCell, texts), TableCell(in_use)])
    notes = ["Mean routing weight over all sites, in %.", *_sd_note(analysis)]
    head = ["task", "first", "second", "third", "experts in use"]
    return _table(f"{suite.suite}: leading experts", head, rows, notes, texts=4)


def entropies(analysis: Analysis, by: str) -> Table:
    """One row per kind of site (`by="kind"`) or per layer (`by="layer"`), averaged over suites."""
    labels = analysis.grid.kinds if by == "kind" else analysis.grid.layers
    rows = []
    for i, label in enumerate(labels):

        def part(values_RLK: Array, i: int = i) -> Array:
            return np.nanmean(values_RLK[:, :, i] if by == "kind" else values_RLK[:, i], axis=1)

        rows.append([TableCell(label), *_entropy_cells(analysis.suites, part)])
    title = "Entropy by kind of site" if by == "kind" else "Entropy by layer"
    over = "layers" if by == "kind" else "kinds of sites"
    notes = [_ENTROPY_NOTE, f"Mean over the tasks of a suite, the suites and the {over}.", *_sd_note(analysis)]
    return _table(title, [by, *_entropy_head()], rows, notes, texts=1)


def correlations(analysis: Analysis) -> Table:
    """Correlations of the distance from the Oracle with performance."""
    assert analysis.distance is not None
    rows = []
    for suite, by_field in analysis.distance.correlations.items():
        for name, one in by_field.items():
            row = [TableCell(suite), TableCell(AGAINST[name]), TableCell(str(one.num_tasks))]
            for value, interval in ((one.pearson, one.pearson_interval), (one.spearman, one.spearman_interval)):
                sure = interval is not None and interval.excludes_zero()
                row += [TableCell(_signed(value)), TableCell(_limits(interval), bold=sure)]
            rows.append(row)
    notes = [
        "Correlation, over tasks, of the distance with the router's score, and with that score minus the Oracle's and"
        f" minus the base's. The paper has Pearson {_signed(PAPERS_PEARSON, 1)} for T5-XL. Intervals: 95 %, other tasks"
        " of the kind; bold ones exclude zero; with many intervals, some do so by chance.",
        *(
            [f"{ALL}: the paper's suites together, without leave-one-out."]
            if ALL in analysis.distance.correlations
            else []
        ),
    ]
    head = ["suite", "distance against", "tasks", "Pearson", "interval", "Spearman", "interval"]
    return _table("Distance from the Oracle and performance", head, rows, notes, texts=2)


def distances(analysis: Analysis) -> Table:
    """One row per task: its distance from the Oracle."""
    assert analysis.distance is not None
    rows = [
        [
            TableCell(f"{point.suite}/{point.task}"),
            TableCell(", ".join(dict.fromkeys(point.experts))),
            TableCell(percent(point.usage)),
            TableCell(_number(np.float64(point.kl), None if point.kl_sd is None else np.float64(point.kl_sd))),
            TableCell(percent(point.score)),
            TableCell(percent(point.to_oracle, sign=True)),
            TableCell(NOTHING if point.to_base is None else percent(point.to_base, sign=True)),
        ]
        for point in sorted(analysis.distance.points, key=lambda point: point.kl)
    ]
    notes = [
        "Distance: KL divergence of the usage from the Oracle's choice, which is the negative logarithm of its expert's"
        f" share, in nats; a share below {100 * FLOOR:g} % counts as that. Of equally good experts the Oracle takes the"
        " first by name. Each seed's pool has its own Oracle.",
        *_sd_note(analysis),
    ]
    head = ["task", "Oracle's expert", "its share", "distance", "score", "minus Oracle", "minus base"]
    return _table("Distance from the Oracle by task", head, rows, notes, texts=2)


def markdown(analysis: Analysis) -> str:
    """All tables in GitHub's Markdown."""
    header = analysis.header
    lines = [
        "# Analysis of the routing",
        "",
        f"Router {header.method}, base model {header.base}, {len(header.experts)} experts, {len(header.sites)} sites,"
        f" {len(analysis.seeds)} {'recording' if len(analysis.seeds) == 1 else 'recordings'}.",
    ]
    for table in all_tables(analysis):
        lines += ["", *markdown_lines(table)]
    for note in analysis.notes:
        lines += ["", note]
    return "\n".join(lines) + "\n"


def to_json(analysis: Analysis) -> dict[str, Any]:
    """All numbers of the tables and figures: means and standard deviations (null with one recording)."""
    return {
        "format": 1,
        **{name: getattr(analysis.header, name) for name in ("method", "router", "base", "dtype", "limit", "text")},
        "pools": analysis.pools,
        "seeds": analysis.seeds,
        "experts": list(analysis.header.experts),
        "layers": analysis.grid.layers,
        "kinds": analysis.grid.kinds,
        "suites": {suite.suite: _suite_json(suite) for suite in analysis.suites},
        "own": [asdict(one) for one in analysis.own],
        "distance": None if analysis.distance is None else _finite(asdict(analysis.distance)),
        "similarity": _rounded(analysis.similarity_EE),
        "heatmaps": {
            f"{name}/{task}": _mean_and_sd(analysis.suite(name).layers_RTLE[:, analysis.suite(name).tasks.index(task)])
            for name, task in analysis.heatmaps
        },
        "notes": analysis.notes,
    }


def _suite_json(suite: SuiteRouting) -> dict[str, Any]:
    return {
        "tasks": suite.tasks,
        "usage": _mean_and_sd(suite.usage_RTE),
        "entropy": {
            name: {"nats": _mean_and_sd(one.nats_RLK), "share": _mean_and_sd(one.share_RLK)}
            for name, one in suite.entropies.items()
        },
    }


def _mean_and_sd(values: Array) -> dict[str, Any]:
    mean, sd = spread(values)
    return {"mean": _rounded(mean), "sd": None if sd is None else _rounded(sd)}


def _rounded(values: Array) -> Any:
    return _finite(np.round(values, DECIMALS).tolist())


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON lacks, with None."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _entropy_head() -> list[str]:
    return [f"{SHORT[name]}, {unit}" for name in MEASURES for unit in ("nats", "%")]


def _entropy_cells(suites: Sequence[SuiteRouting], reduce: Any) -> list[TableCell]:
    """Each measure in nats and in percent; `reduce` maps (R, L, K) to (R,)."""
    cells = []
    for name in MEASURES:
        both = [
            np.mean([reduce(getattr(suite.entropies[name], field)) for suite in suites], axis=0)
            for field in ("nats_RLK", "share_RLK")
        ]
        cells += [TableCell(_number(*spread(both[0]))), TableCell(_number(*spread(100 * both[1]), digits=1))]
    return cells


def _table(
    title: str, head: list[str], rows: list[list[TableCell]], notes: list[str], texts: int | tuple[int, ...]
) -> Table:
    """A table whose columns are numeric except `texts`: the first so many, or those with these indices."""
    columns = range(texts) if isinstance(texts, int) else texts
    return Table(
        title=title,
        head=head,
        numeric=[i not in columns for i in range(len(head))],
        rows=rows,
        notes=notes,
        split_from=1,
    )


def _sd_note(analysis: Analysis) -> list[str]:
    return ["±: standard deviation between seeds."] if len(analysis.seeds) > 1 else []


def _number(mean: Any, sd: Any = None, digits: int = 2) -> str:
    if not np.isfinite(mean):
        return NOTHING
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _percent(mean: float, sd: float | None) -> str:
    return percent(mean) + ("" if sd is None else f" ± {percent(sd)}")


def _signed(value: float, digits: int = 2) -> str:
    return NOTHING if not math.isfinite(value) else f"{value:+.{digits}f}".replace("-", MINUS)


def _limits(interval: Interval | None) -> str:
    return NOTHING if interval is None else f"[{_signed(interval.low)}, {_signed(interval.high)}]"
