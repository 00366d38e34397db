"""The routing of a suite's tasks, over several recordings.

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
# measure -> the distribution whose entropy it is
MEASURES = {
    "scores": "softmax over all scores",
    "chosen": "weights of the chosen",
    "usage": "usage of the task",
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Entropy:
    """One measure's entropy, averaged over a suite's tasks. NaN where a layer has no such site.

    Attributes:
        nats_RLK: entropy in nats.
        share_RLK: entropy as a fraction of the largest possible one.
    """

    nats_RLK: Array
    share_RLK: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class SuiteRouting:
    """The routing of one suite.

    Attributes:
        suite: name of the suite.
        tasks: names of its tasks.
        masked_TE: whether an expert was masked for a task.
        usage_RTE: mean routing weight over all sites.
        layers_RTLE: mean routing weight over the sites of each layer.
        entropies: measure (see `MEASURES`) -> entropy.
    """

    suite: str
    tasks: list[str]
    masked_TE: NDArray[np.bool_]
    usage_RTE: Array
    layers_RTLE: Array
    entropies: dict[str, Entropy]


def suite_routing(recordings: Sequence[Recording], suite: str, tasks: list[str], grid: SiteGrid) -> SuiteRouting:
    """Average the routing of a suite's tasks over sites.

    Args:
        recordings: recordings with the same experts, sites and router.
        suite: name of the suite.
        tasks: names of tasks that all recordings have.
        grid: layers and kinds of the sites.
    """

    def stacked(field: str) -> Array:
        return np.array([[getattr(one.tasks[suite, task], field) for task in tasks] for one in recordings])

    header = recordings[0].header
    weights_RTME, usable_RTM = stacked("weights_ME"), stacked("usable_M")
    name = header.router["router"]
    # a router of one's own (MODULE:CLASS) is not imported because a file names it; it takes top_k
    fixed_top_k = ":" not in name and router_class(name).fixed_top_k
    top_k = np.inf if fixed_top_k else header.router["top_k"]
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
    """Entropy in nats over the last axis; NaN where a weight is NaN."""
    return -np.sum(weights * np.log(np.where(weights > 0, weights, 1.0)), axis=-1)


def _shares(nats: Array, among: Array) -> Array:
    """Entropy as a fraction of the largest for `among` experts; NaN where fewer than two can be chosen."""
    return np.divide(nats, np.log(np.maximum(among, 1)), out=np.full_like(nats, np.nan), where=among > 1)


def spread(values: Array) -> tuple[Array, Array | None]:
    """Mean and standard deviation over the first axis, the recordings; no deviation (None) with one."""
    return values.mean(axis=0), values.std(axis=0, ddof=1) if len(values) > 1 else None
