"""The routing of a suite's tasks, from several recordings.

Axes: R recordings, T tasks, M sites, E experts, L layers, K kinds of sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phatgoose.analysis.recording import Recording
from phatgoose.analysis.site_grid import SiteGrid
from phatgoose.routers import router_class

Array = NDArray[np.float64]
# measure -> what it is the entropy of
MEASURES = {
    "scores": "softmax over all scores",
    "chosen": "weights of the chosen",
    "usage": "usage of the task",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Entropy:
    """One measure's means over a suite's tasks.

    Attributes:
        nats_RLK: NaN where a layer has no such site.
        share_RLK: of the largest entropy that is possible there.
    """

    nats_RLK: Array
    share_RLK: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class SuiteRouting:
    """One suite.

    Attributes:
        suite: its name.
        tasks: names.
        masked_TE: experts that a task could not choose.
        usage_RTE: mean routing weight over all sites.
        layers_RTLE: the same over the sites of a layer.
        entropies: by measure, see `MEASURES`.
    """

    suite: str
    tasks: list[str]
    masked_TE: NDArray[np.bool_]
    usage_RTE: Array
    layers_RTLE: Array
    entropies: dict[str, Entropy]


def suite_routing(recordings: Sequence[Recording], suite: str, tasks: list[str], grid: SiteGrid) -> SuiteRouting:
    """Average over sites.

    Args:
        recordings: that agree in experts, sites and router.
        suite, tasks: which all of them have.
        grid: of their sites.
    """

    def stacked(field: str) -> Array:
        return np.array([[getattr(one.tasks[suite, task], field) for task in tasks] for one in recordings])

    header = recordings[0].header
    weights_RTME, usable_RTM = stacked("weights_ME"), stacked("usable_M")
    top_k = np.inf if router_class(header.router["router"]).fixed_top_k else header.router["top_k"]
    entropies = {
        "scores": (stacked("entropy_all_M"), usable_RTM),
        "chosen": (stacked("entropy_chosen_M"), np.minimum(usable_RTM, top_k)),
        "usage": (entropy(weights_RTME), usable_RTM),
    }
    masked = [recordings[0].tasks[suite, task].masked for task in tasks]
    return SuiteRouting(
        suite=suite,
        tasks=tasks,
        masked_TE=np.array([[name in gone for name in header.experts] for gone in masked]),
        usage_RTE=np.nanmean(weights_RTME, axis=2),
        layers_RTLE=np.moveaxis(grid.by_layer(np.moveaxis(weights_RTME, 2, 3)), 3, 2),
        entropies={
            name: Entropy(
                nats_RLK=grid.cells(nats_RTM).mean(axis=1),
                share_RLK=grid.cells(_shares(nats_RTM, among_RTM)).mean(axis=1),
            )
            for name, (nats_RTM, among_RTM) in entropies.items()
        },
    )


def entropy(weights: Array) -> Array:
    """Entropy (nats) over the last axis; NaN stays NaN."""
    return -np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), axis=-1)


def _shares(nats: Array, among: Array) -> Array:
    """Of the largest entropy among so many; NaN where one or none is left to choose."""
    return np.divide(nats, np.log(np.maximum(among, 1)), out=np.full_like(nats, np.nan), where=among > 1)


def spread(values: Array) -> tuple[Array, Array | None]:
    """Mean and standard deviation over the first axis, the recordings; None with one of them."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None
