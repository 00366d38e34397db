"""Bootstrap intervals against exact distributions and formulas.

Axes: M methods, T tasks, C examples, D draws.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from phatgoose.config import BootstrapConfig
from phatgoose.errors import ConfigError
from phatgoose.results.bootstrap import Interval, draw_averages, over_tasks, percentiles

CONFIG = BootstrapConfig(num_resamples=20_000)
# How far a standard deviation of D draws may be off: four of its own standard errors, 1 / sqrt(2 D).
SD_ERROR = 4 / math.sqrt(2 * CONFIG.num_resamples)


def draw(sums_MC, counts_C, seed=0):
    return draw_averages(np.array(sums_MC, float), np.array(counts_C, float), CONFIG, np.random.default_rng(seed))


def exact_quantile(values, q):
    """Quantile of the mean over all resamples, with its distance in probability from the nearest jump."""
    means = sorted(np.mean(resample) for resample in itertools.product(values, repeat=len(values)))
    index = math.floor(q * len(means))
    same = [i for i, mean in enumerate(means) if abs(mean - means[index]) < 1e-12]
    margin = min(q - same[0] / len(means), (same[-1] + 1) / len(means) - q)
    return means[index], margin


@pytest.mark.parametrize("scores", [[0.1, 0.4, 0.45, 0.9], [0.0, 0.1, 0.3, 0.9, 1.0]])
def test_limits_over_tasks_are_those_of_all_resamples(scores):
    config = BootstrapConfig(num_resamples=400_000)
    reference = np.linspace(0.2, 0.3, len(scores))
    found = over_tasks(np.array(scores), reference, config)
    tail = (1 - config.confidence) / 2
    # five standard errors of a share of D draws: nearer to a jump, the drawing could land on either side
    error = 5 * math.sqrt(tail * (1 - tail) / config.num_resamples)
    for limit, q in ((found.low, tail), (found.high, 1 - tail)):
        expected, margin = exact_quantile(list(np.array(scores) - reference), q)
        assert margin > error, "choose other scores"
        assert limit == pytest.approx(expected, abs=1e-12)


def test_own_interval_is_the_difference_from_zero():
    scores = np.array([0.1, 0.5, 0.2, 0.9])
    assert over_tasks(scores, None, CONFIG) == over_tasks(scores, np.zeros(4), CONFIG)


def test_constant_difference_has_no_width():
    scores = np.random.default_rng(0).random(11)
    found = over_tasks(scores + 0.125, scores, CONFIG)
    assert (found.low, found.high) == (pytest.approx(0.125, abs=1e-12), pytest.approx(0.125, abs=1e-12))
    # unpaired, the same two methods would have an interval
    assert over_tasks(scores, None, CONFIG).high - over_tasks(scores, None, CONFIG).low > 0.1
    averages = draw([scores + 0.125, scores], np.ones(11))
    assert np.ptp(averages[0] - averages[1]) < 1e-12
    assert np.ptp(averages[0]) > 0.1


def test_one_task_says_nothing_about_others():
    assert over_tasks(np.array([0.5]), None, CONFIG) is None


def test_two_examples_have_three_averages():
    averages = draw([[3, 1]], [4, 2])[0]
    values, times = np.unique(averages.round(12), return_counts=True)
    assert values == pytest.approx([1 / 2, 4 / 6, 3 / 4])  # twice the second, both, twice the first
    for count, share in zip(times, (1 / 4, 1 / 2, 1 / 4), strict=True):
        error = math.sqrt(share * (1 - share) / CONFIG.num_resamples)
        assert count / CONFIG.num_resamples == pytest.approx(share, abs=5 * error)


def test_renderings_of_an_example_are_drawn_together():
    rng = np.random.default_rng(1)
    counts = np.full(300, 5.0)
    right = rng.random(300)
    sums = rng.binomial(5, np.where(right < 0.5, 0.05, 0.95)).astype(float)
    means = sums / 5
    formula = means.std() / math.sqrt(300)
    found = draw([sums], counts)[0].std()
    assert found == pytest.approx(formula, rel=SD_ERROR)
    rows_alone = math.sqrt(means.mean() * (1 - means.mean()) / 1500)
    assert abs(found - rows_alone) > 10 * SD_ERROR * formula


def test_unequal_numbers_of_renderings():
    rng = np.random.default_rng(2)
    counts = rng.integers(1, 9, 800).astype(float)
    sums = rng.binomial(counts.astype(int), rng.random(800)).astype(float)
    ratio = sums.sum() / counts.sum()
    # variance of a ratio of two means to the first order (Cochran, Sampling Techniques, section 2.11); what is left
    # out is of the order of 1 / C of it
    formula = math.sqrt(np.mean((sums - ratio * counts) ** 2) / 800) / counts.mean()
    assert draw([sums], counts)[0].std() == pytest.approx(formula, rel=SD_ERROR + 10 / 800)


def test_draws_do_not_depend_on_the_other_methods():
    sums, counts = np.random.default_rng(3).random((3, 40)), np.ones(40)
    together = draw(sums, counts)
    for i in range(3):
        np.testing.assert_allclose(draw(sums[i : i + 1], counts)[0], together[i], rtol=1e-12)


def test_batches_do_not_matter():
    # more examples than one batch has resamples, in one go and in several
    sums, counts = np.random.default_rng(4).random((1, 3000)), np.ones(3000)
    averages = draw(sums, counts)
    assert averages.shape == (1, CONFIG.num_resamples)
    assert averages[0].std() == pytest.approx(sums.std() / math.sqrt(3000), rel=SD_ERROR)
    assert averages[0].mean() == pytest.approx(sums.mean(), abs=5 * sums.std() / math.sqrt(3000 * CONFIG.num_resamples))


def test_tasks_of_one_size_are_resampled_apart():
    rng = np.random.default_rng(5)
    sums, counts = rng.random((1, 50)), np.ones(50)
    first, second = (draw_averages(sums, counts, CONFIG, rng)[0] for _ in range(2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / math.sqrt(CONFIG.num_resamples)


def test_percentiles():
    assert percentiles(np.arange(101.0), BootstrapConfig(confidence=0.5)) == Interval(25.0, 75.0)


@pytest.mark.parametrize(("low", "high", "answer"), [(-1, 1, False), (0, 1, False), (0.1, 1, True), (-1, -0.1, True)])
def test_excludes_zero(low, high, answer):
    assert Interval(low, high).excludes_zero() is answer


def test_same_seed_same_limits():
    scores = np.random.default_rng(6).random(9)
    assert over_tasks(scores, None, CONFIG) == over_tasks(scores, None, CONFIG)
    other = over_tasks(scores, None, BootstrapConfig(num_resamples=CONFIG.num_resamples, seed=1))
    assert other != over_tasks(scores, None, CONFIG)


@pytest.mark.parametrize(
    "settings",
    [{"num_resamples": 99}, {"confidence": 0.0}, {"confidence": 1.0}, {"confidence": math.nan}, {"seed": -1}],
)
def test_settings_that_cannot_be(settings):
    with pytest.raises(ConfigError):
        BootstrapConfig(**settings)
