"""Summarises recordings: which experts are used for what, how concentrated the routing is, how close to the Oracle's.

Each recording is one repetition: a pool trained with another seed.

Axes: R recordings, T tasks, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import cluster

from phatgoose.analysis.oracle_distance import OracleDistance, distance_from_oracle
from phatgoose.analysis.recording import Recording, RecordingHeader, read_recording
from phatgoose.analysis.site_grid import SiteGrid
from phatgoose.analysis.suite_routing import SuiteRouting, entropy, spread, suite_routing
from phatgoose.config import BootstrapConfig
from phatgoose.errors import ResultsError
from phatgoose.results.names import HELD_IN, LEAVE_ONE_OUT, SUITES
from phatgoose.results.rows import Result

Array = NDArray[np.float64]
# header fields in which averaged recordings must agree
SHARED = ("method", "router", "base", "experts", "sites", "text", "limit", "dtype")


@dataclass(frozen=True, kw_only=True)
class OwnShare:
    """The share of a held-in task's own expert in its routing weights.

    Attributes:
        task: name of the task, and of its own expert.
        share: mean over the recordings.
        share_sd: standard deviation between recordings; None with one recording.
        rank: rank of the own expert by mean share; 1 is the largest.
        leader: the expert with the largest mean share.
        leader_share: its share.
    """

    task: str
    share: float
    share_sd: float | None
    rank: int
    leader: str
    leader_share: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Analysis:
    """Everything that the tables, the figures and the page show.

    Attributes:
        header: header of the first recording; the others agree in `SHARED`.
        seeds: seeds of the recordings.
        pools: names of the pools, in the order of the recordings.
        num_rows: (fewest, most) rows of a task.
        grid: layers and kinds of the sites.
        suites: routing of each suite, in the order of `SUITES`.
        own: held-in tasks, largest share first; empty without held-in.
        distance: distance from the Oracle; None without the necessary results.
        similarity_EE: cosine similarity of two experts' usage over all tasks, averaged over the recordings.
        similarity_order: expert ids, ordered so that similar experts are adjacent.
        heatmaps: (suite, task) pairs whose layers are drawn.
        heatmaps_why: a sentence on why these are drawn.
        notes: what a reader should know, in sentences.
    """

    header: RecordingHeader
    seeds: list[int]
    pools: list[str]
    num_rows: tuple[int, int]
    grid: SiteGrid
    suites: list[SuiteRouting]
    own: list[OwnShare]
    distance: OracleDistance | None
    similarity_EE: Array
    similarity_order: list[int]
    heatmaps: list[tuple[str, str]]
    heatmaps_why: str
    notes: list[str]

    def suite(self, name: str) -> SuiteRouting:
        """The routing of one suite."""
        return next(one for one in self.suites if one.suite == name)


def analyse(
    folders: Sequence[Path],
    results: Sequence[Result] = (),
    *,
    heatmaps: Sequence[str] = (),
    bootstrap: BootstrapConfig | None = None,
) -> Analysis:
    """Read and summarise recordings.

    Args:
        folders: recording folders, one for each repetition.
        results: rows of `phatgoose eval` for the same pools, for the distance from the Oracle.
        heatmaps: tasks as "suite/task" whose layers are drawn; if empty, some are chosen.
        bootstrap: settings of the correlations' intervals.

    Raises:
        ResultsError: a folder is not a recording, is damaged or is empty,
            recordings do not belong together, or a task in `heatmaps` is unknown.
    """
    recordings = [read_recording(folder) for folder in dict.fromkeys(folders)]
    notes = _check_alike(recordings)
    header = recordings[0].header
    grid = SiteGrid(header.sites, encoder_decoder=header.encoder_decoder)
    common = [key for key in recordings[0].tasks if all(key in one.tasks for one in recordings)]
    suites = [
        suite_routing(recordings, suite, [task for other, task in common if other == suite], grid)
        for suite in SUITES
        if any(other == suite for other, _ in common)
    ]
    distance, reasons = distance_from_oracle(recordings, common, results, bootstrap or BootstrapConfig())
    chosen, why = _heatmaps(suites, distance, heatmaps)
    similarity_EE = _similarity(suites)
    rows = [recordings[0].tasks[key].num_rows for key in common]
    return Analysis(
        header=header,
        seeds=[one.header.seed for one in recordings],
        pools=list(dict.fromkeys(one.header.pool_name for one in recordings)),
        num_rows=(min(rows), max(rows)),
        grid=grid,
        suites=suites,
        own=_own(suites, header.experts),
        distance=distance,
        similarity_EE=similarity_EE,
        similarity_order=_order(similarity_EE),
        heatmaps=chosen,
        heatmaps_why=why,
        notes=[*notes, *reasons],
    )


def _check_alike(recordings: Sequence[Recording]) -> list[str]:
    first = recordings[0]
    for one in recordings:
        if not one.tasks:
            raise ResultsError(
                f"{one.folder} has no finished task", fix="let phatgoose record finish at least one task"
            )
        unequal = [name for name in SHARED if getattr(one.header, name) != getattr(first.header, name)]
        if unequal:
            raise ResultsError(
                f"{first.folder} and {one.folder} cannot be averaged: they differ in {unequal[0]}",
                found=f"{str(getattr(first.header, unequal[0]))[:80]} and {str(getattr(one.header, unequal[0]))[:80]}",
                expected="one router and one set of experts, trained with different seeds",
                fix="analyse each of them alone",
            )
        for key in first.tasks.keys() & one.tasks.keys():
            if first.tasks[key].data != one.tasks[key].data:
                raise ResultsError(
                    f"{first.folder} and {one.folder} have different rows of {key[0]}/{key[1]}",
                    expected="the same rows in all recordings",
                    fix="record one of them again, with the data of the other",
                )
    runs = [(one.header.pool, one.header.seed) for one in recordings]
    if len(set(runs)) < len(runs):
        raise ResultsError(
            "two recordings are of the same pool, with the same seed",
            found=", ".join(str(one.folder) for one in recordings),
            expected="one recording for the pool of each training seed",
        )
    every = {key for one in recordings for key in one.tasks}
    lacking = sorted(key for key in every if any(key not in one.tasks for one in recordings))
    if len(lacking) == len(every):
        raise ResultsError("the recordings have no task in common", fix="let phatgoose record finish all of them")
    return [f"Left out, because not all recordings have them: {', '.join(map('/'.join, lacking))}."] * bool(lacking)


def _own(suites: Sequence[SuiteRouting], experts: Sequence[str]) -> list[OwnShare]:
    shares = []
    for suite in suites:
        for t, task in enumerate(suite.tasks if suite.suite == HELD_IN else ()):
            mean_E, sd_E = spread(suite.usage_RTE[:, t])
            own, leader = experts.index(task), int(mean_E.argmax())
            shares.append(
                OwnShare(
                    task=task,
                    share=float(mean_E[own]),
                    share_sd=None if sd_E is None else float(sd_E[own]),
                    rank=1 + int((mean_E > mean_E[own]).sum()),
                    leader=experts[leader],
                    leader_share=float(mean_E[leader]),
                )
            )
    return sorted(shares, key=lambda one: -one.share)


def _similarity(suites: Sequence[SuiteRouting]) -> Array:
    # leave-one-out repeats the held-in tasks, each without one expert
    parts = [one.usage_RTE for one in suites if one.suite != LEAVE_ONE_OUT] or [one.usage_RTE for one in suites]
    usage_RTE = np.concatenate(parts, axis=1)
    norms_R1E = np.linalg.norm(usage_RTE, axis=1, keepdims=True)
    unit_RTE = usage_RTE / np.maximum(norms_R1E, 1e-12)
    return np.einsum("rte,rtf->ref", unit_RTE, unit_RTE).mean(axis=0)


def _order(similarity_EE: Array) -> list[int]:
    if len(similarity_EE) < 3:
        return list(range(len(similarity_EE)))
    apart_EE = np.clip(1 - similarity_EE, 0, None)
    pairs = apart_EE[np.triu_indices(len(apart_EE), k=1)]
    linkage = cluster.hierarchy.linkage(pairs, method="average", optimal_ordering=True)
    return [int(e) for e in cluster.hierarchy.leaves_list(linkage)]


def _heatmaps(
    suites: Sequence[SuiteRouting], distance: OracleDistance | None, asked: Sequence[str]
) -> tuple[list[tuple[str, str]], str]:
    known = [(suite.suite, task) for suite in suites for task in suite.tasks]
    if asked:
        chosen = []
        for text in dict.fromkeys(asked):
            suite_name, _, task = text.partition("/")
            if (suite_name, task) not in known:
                raise ResultsError(
                    f"no recorded task {text!r}", expected=", ".join("/".join(key) for key in known)[:400]
                )
            chosen.append((suite_name, task))
        return chosen, "The tasks that were asked for."
    held_out = [one for one in suites if one.suite not in (HELD_IN, LEAVE_ONE_OUT)] or list(suites)
    if distance is not None:
        points = [point for point in distance.points if point.suite in {one.suite for one in held_out}]
        order = [(point.suite, point.task) for point in sorted(points, key=lambda point: point.kl)]
        if order:
            return _ends(order), "The held-out tasks whose routing is nearest to the Oracle's choice, and the farthest."
    concentration = {
        (one.suite, task): float(entropy(one.usage_RTE[:, t]).mean())
        for one in held_out
        for t, task in enumerate(one.tasks)
    }
    order = sorted(concentration, key=lambda key: concentration[key])
    return _ends(order), "The tasks that use the fewest experts, and those that use the most (by the entropy of usage)."


def _ends(order: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return order if len(order) <= 4 else [*order[:2], *order[-2:]]
