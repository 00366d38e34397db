"""Percentile bootstrap intervals of an average over tasks.

Two intervals answer two questions. How would the average change with other
tasks of the same kind? Resample the tasks. How would it change with other
examples of these tasks? Resample the examples within each task. Every method
gets the same resamples, so the interval of a difference is that of a paired
comparison.

Percentile intervals, not BCa: they exist where BCa is undefined (two methods
with the same difference on every task), need no jackknife through an average of
many tasks, and the limits of a difference are quantiles of the plotted draws.
BCa corrects skewness, but with a dozen tasks it estimates the skewness from a
dozen numbers (Efron and Tibshirani, An Introduction to the Bootstrap, 1993,
chapters 13 and 14).

Axes: M methods, T tasks, C examples, D draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from phatgoose.config import BootstrapConfig

Array = NDArray[np.float64]
# numbers in one batch of resamples: 32 MiB in float64
BATCH_NUMBERS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """Limits, in the unit of the resampled quantity."""

    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether both limits lie on one side of zero."""
        return self.low > 0 or self.high < 0


def over_tasks(scores_T: Array, reference_T: Array | None, config: BootstrapConfig) -> Interval | None:
    """Interval of the mean over tasks: of one method's scores, or of the difference between two methods.

    Args:
        scores_T: scores of the method.
        reference_T: scores of the other method on the same tasks; None for the
            interval of `scores_T` itself.
        config: bootstrap settings.

    Returns:
        The interval of mean(scores_T - reference_T); None with fewer than two
        tasks, which say nothing about other tasks.
    """
    if len(scores_T) < 2:
        return None
    reference_T = np.zeros_like(scores_T) if reference_T is None else reference_T
    limits = stats.bootstrap(
        (scores_T, reference_T),
        lambda scores, reference, axis: np.mean(scores - reference, axis=axis),
        paired=True,
        vectorized=True,
        n_resamples=config.num_resamples,
        confidence_level=config.confidence,
        method="percentile",
        rng=np.random.default_rng(config.seed),
    ).confidence_interval
    return Interval(float(limits.low), float(limits.high))


def draw_averages(sums_MC: Array, counts_C: Array, config: BootstrapConfig, rng: np.random.Generator) -> Array:
    """Averages of one task, each over a resample of its examples.

    An example is drawn with all its renderings (as a cluster), because the
    renderings of one example tend to be right or wrong together.

    Args:
        sums_MC: each method's sum of scores over the renderings of an example.
        counts_C: number of renderings of each example; at least two examples.
        config: bootstrap settings; `rng` takes the place of their seed.
        rng: random generator. Pass the same one for the next task: with equal
            seeds, tasks of equal size would be resampled in step.

    Returns:
        averages_MD: averages of row scores, (M, num_resamples).
    """
    num_examples = len(counts_C)

    # scipy resamples indices of examples, and the scores are looked up here, so that one resample serves all methods:
    # the effect of `paired=True`, without a copy of the scores for each resample and method
    def averages(indices: NDArray[np.int64], axis: int = -1) -> Array:
        indices_DC = np.atleast_2d(indices)
        draws = len(indices_DC)
        flat = indices_DC + num_examples * np.arange(draws)[:, None]
        times_DC = np.bincount(flat.ravel(), minlength=draws * num_examples).reshape(draws, num_examples)
        times_CD = times_DC.T.astype(np.float64)
        return np.asarray(sums_MC @ times_CD / (counts_C @ times_CD))

    result = stats.bootstrap(
        (np.arange(num_examples),),
        averages,
        vectorized=True,
        n_resamples=config.num_resamples,
        batch=max(1, BATCH_NUMBERS // num_examples),
        method="percentile",
        rng=rng,
    )
    return np.asarray(result.bootstrap_distribution)


def percentiles(draws_D: Array, config: BootstrapConfig) -> Interval:
    """The middle `confidence` of the draws."""
    tail = (1 - config.confidence) / 2
    low, high = np.quantile(draws_D, [tail, 1 - tail])
    return Interval(float(low), float(high))
