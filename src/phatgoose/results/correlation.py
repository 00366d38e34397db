"""Correlation over tasks, with an interval.

Axes: T tasks, D draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from phatgoose.config import BootstrapConfig
from phatgoose.results.bootstrap import Interval, percentiles

Array = NDArray[np.float64]
# Of three points, one resample in nine is the same point three times, and every other of two points is a line.
FEWEST = 4


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Of two numbers that each task has.

    Attributes:
        pearson, spearman: coefficients; NaN if one of the numbers is the same for all tasks.
        pearson_interval, spearman_interval: if other tasks of the kind had been
            drawn; None with fewer than `FEWEST` tasks.
        num_tasks: how many.
    """

    pearson: float
    spearman: float
    pearson_interval: Interval | None
    spearman_interval: Interval | None
    num_tasks: int


def correlate(x_T: Array, y_T: Array, config: BootstrapConfig) -> Correlation:
    """Pearson's and Spearman's correlation, with percentile intervals of a paired bootstrap over tasks."""
    return Correlation(
        pearson=float(pearson(x_T, y_T)),
        spearman=float(spearman(x_T, y_T)),
        pearson_interval=_interval(pearson, x_T, y_T, config),
        spearman_interval=_interval(spearman, x_T, y_T, config),
        num_tasks=len(x_T),
    )


def pearson(x: Array, y: Array, axis: int = -1) -> Array:
    """Pearson's coefficient along an axis; NaN where x or y is constant, to rounding."""
    x, y = (values - values.mean(axis=axis, keepdims=True) for values in (x, y))
    norms = np.sqrt((x**2).sum(axis=axis) * (y**2).sum(axis=axis))
    products = np.asarray((x * y).sum(axis=axis))
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 1e-12)


def spearman(x: Array, y: Array, axis: int = -1) -> Array:
    """Pearson's coefficient of the ranks; equal values share the mean of their ranks."""
    return pearson(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis)


def _interval(coefficient: Callable[..., Array], x_T: Array, y_T: Array, config: BootstrapConfig) -> Interval | None:
    if len(x_T) < FEWEST or np.isnan(coefficient(x_T, y_T)):
        return None
    with warnings.catch_warnings():
        # a resample of one task, again and again, has no correlation: it is left out below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        found = stats.bootstrap(
            (x_T, y_T),
            coefficient,
            paired=True,
            vectorized=True,
            n_resamples=config.num_resamples,
            method="percentile",
            rng=np.random.default_rng(config.seed),
        )
    draws_D = np.asarray(found.bootstrap_distribution)
    return percentiles(draws_D[~np.isnan(draws_D)], config)
