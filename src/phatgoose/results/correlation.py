"""Correlation over tasks, with bootstrap intervals.

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
# fewest tasks with an interval: of three points, one resample in nine repeats a single point, and two thirds have only
# two distinct points, which lie on a line
FEWEST = 4


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Correlation of two quantities over tasks.

    Attributes:
        pearson, spearman: coefficients; NaN if one quantity is the same for all tasks.
        pearson_interval, spearman_interval: intervals over tasks; None with
            fewer than `FEWEST` tasks, or where the coefficient is NaN.
        num_tasks: number of tasks.
    """

    pearson: float
    spearman: float
    pearson_interval: Interval | None
    spearman_interval: Interval | None
    num_tasks: int


def correlate(x_T: Array, y_T: Array, config: BootstrapConfig) -> Correlation:
    """Pearson and Spearman correlations, with percentile intervals from a paired bootstrap over tasks."""
    return Correlation(
        pearson=float(pearson(x_T, y_T)),
        spearman=float(spearman(x_T, y_T)),
        pearson_interval=_interval(pearson, x_T, y_T, config),
        spearman_interval=_interval(spearman, x_T, y_T, config),
        num_tasks=len(x_T),
    )


def pearson(x: Array, y: Array, axis: int = -1) -> Array:
    """Pearson coefficient along an axis; NaN where x or y is constant up to rounding."""
    x, y = (values - values.mean(axis=axis, keepdims=True) for values in (x, y))
    norms = np.sqrt((x**2).sum(axis=axis) * (y**2).sum(axis=axis))
    products = np.asarray((x * y).sum(axis=axis))
    return np.divide(products, norms, out=np.full_like(products, np.nan), where=norms > 1e-12)


def spearman(x: Array, y: Array, axis: int = -1) -> Array:
    """Pearson coefficient of the ranks; ties share the mean of their ranks."""
    return pearson(stats.rankdata(x, axis=axis), stats.rankdata(y, axis=axis), axis)


def _interval(coefficient: Callable[..., Array], x_T: Array, y_T: Array, config: BootstrapConfig) -> Interval | None:
    if len(x_T) < FEWEST or np.isnan(coefficient(x_T, y_T)):
        return None
    with warnings.catch_warnings():
        # a resample that repeats a single task has no correlation; it is dropped below
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        result = stats.bootstrap(
            (x_T, y_T),
            coefficient,
            paired=True,
            vectorized=True,
            n_resamples=config.num_resamples,
            method="percentile",
            rng=np.random.default_rng(config.seed),
        )
    draws_D = np.asarray(result.bootstrap_distribution)
    return percentiles(draws_D[~np.isnan(draws_D)], config)
