"""The paper's tables, through the code that `phatgoose compare` uses.

paper_tables.json holds Tables 3 to 7 of the paper (scores of each task in per
cent), the averages of its Table 1, and the intervals that were once drawn from
the same tables: a paired bootstrap over datasets with 20,000 resamples.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from helpers.results import PAPER, add_paper_table
from phatgoose.config import BootstrapConfig
from phatgoose.results.comparison import compare
from phatgoose.results.reader import read_results

RESAMPLES = 20_000
ROUNDING = 0.05  # of a number with one decimal
SETTINGS = [f"{table['pool']} {table['suite']}" for table in PAPER]
METHODS = [
    "Multitask",
    "Oracle",
    "Best Individual",
    "Retrieval",
    "Arrow",
    "Merged",
    "Merged (parameters)",
    "Average Activation",
    "PHATGOOSE",
]


def name_of(method):
    return "phatgoose" if method == "PHATGOOSE" else method


def scores_of(table, method):
    return np.array(table["scores"][method])


def tolerances(differences):
    """How far each limit may be from the published one.

    A share q of n draws has the standard error sqrt(q (1 - q) / n); seen through the quantile function it is that
    of a limit. Both limits were drawn, so it counts twice: four standard errors of their difference, and the
    table's rounding.
    """
    rng = np.random.default_rng(12345)
    draws = np.concatenate([rng.choice(differences, (20_000, len(differences))).mean(1) for _ in range(10)])
    share = math.sqrt(0.025 * 0.975 / RESAMPLES)
    ends = np.quantile(draws, [0.025 - share, 0.025 + share, 0.975 - share, 0.975 + share])
    return [ROUNDING + 4 * math.sqrt(2) * (ends[i + 1] - ends[i]) / 2 for i in (0, 2)]


@pytest.fixture(scope="module", params=PAPER, ids=SETTINGS)
def table(request):
    return request.param


@pytest.fixture(scope="module")
def comparisons(table, tmp_path_factory):
    """One comparison for each method that PHATGOOSE is compared with, on the table's results folder."""
    folder = add_paper_table(tmp_path_factory.mktemp("results"), table)
    results, warnings = read_results([folder])
    assert warnings == []
    config = BootstrapConfig(num_resamples=RESAMPLES)
    return {method: compare(results, against=method, bootstrap=config).suites[0] for method in table["differences"]}


def test_data_is_complete():
    assert SETTINGS == ["T0HI t0ho", "T0HI bbh", "T0HI bbl", "FLAN bbh", "FLAN bbl"]
    for table, number in zip(PAPER, (11, 22, 17, 22, 17), strict=True):
        assert len(set(table["tasks"])) == number
        assert set(table["scores"]) == set(table["averages"]) == set(METHODS)
        assert {len(row) for row in table["scores"].values()} == {number}
        assert all(0 <= score <= 100 for row in table["scores"].values() for score in row)


def test_averages_of_table_1(table, comparisons):
    suite = comparisons["Arrow"]
    assert len(suite.averages) == len(METHODS)
    for method, published in table["averages"].items():
        average = suite.averages[name_of(method)]
        assert 100 * average.score == pytest.approx(published, abs=ROUNDING + 1e-9), method
        assert average.num_tasks == len(table["tasks"])
        assert average.uses_labels == (method in ("Oracle", "Best Individual"))


def test_best_method_of_table_1(table, comparisons):
    # bold in the paper's table, where the multitask models stand apart
    usable = {m: s for m, s in table["averages"].items() if m not in ("Oracle", "Best Individual")}
    assert comparisons["Arrow"].best == [name_of(max(usable, key=usable.get))]


def test_intervals(table, comparisons):
    checked = 0
    for method, published in table["differences"].items():
        difference = comparisons[method].differences["phatgoose"]
        assert 100 * difference.score == pytest.approx(published[0], abs=0.005 + 1e-9), method
        gaps = scores_of(table, "PHATGOOSE") - scores_of(table, method)
        interval = difference.over_tasks
        found = [100 * interval.low, 100 * interval.high]
        for limit, expected, tolerance in zip(found, published[1:], tolerances(gaps), strict=False):
            assert limit == pytest.approx(expected, abs=tolerance), method
            checked += 1
    assert checked == (12 if table["pool"] == "T0HI" else 8)


def test_other_kinds_of_interval_would_fail():
    """The tolerance is not so wide that any interval passes: BCa's and the basic bootstrap's do not."""
    misses = {"BCa": 0, "basic": 0}
    for table in PAPER:
        for method, published in table["differences"].items():
            gaps = scores_of(table, "PHATGOOSE") - scores_of(table, method)
            allowed = tolerances(gaps)
            for kind in misses:
                found = stats.bootstrap((gaps,), np.mean, n_resamples=RESAMPLES, method=kind, rng=0).confidence_interval
                limits = zip(found, published[1:], allowed, strict=False)
                misses[kind] += sum(abs(limit - expected) > tolerance for limit, expected, tolerance in limits)
    assert min(misses.values()) >= 10, misses


# A task that carries a gap -> setting, other method, what is left of PHATGOOSE's lead without it (points)
CARRIED = {
    "ObjCnt": [("FLAN bbh", "Merged", 0.21), ("FLAN bbh", "Best Individual", -0.12)],
    "Story": [("T0HI t0ho", "Arrow", 0.69)],
}


@pytest.mark.parametrize("task", CARRIED)
def test_a_difference_stands_on_the_tasks_that_both_have(tmp_path, task):
    for i, (setting, other, left) in enumerate(CARRIED[task]):
        table = PAPER[SETTINGS.index(setting)]
        folder = add_paper_table(tmp_path / str(i), table)
        rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
        kept = [row for row in rows if not (f'"{task}"' in row and f'"{other}"' in row)]
        assert len(kept) == len(rows) - 1
        (folder / "rows.jsonl").write_text("".join(kept))
        suite = compare(read_results([folder])[0], against=other).suites[0]
        assert 100 * suite.differences["phatgoose"].score == pytest.approx(left, abs=0.005 + 1e-9)
        assert suite.differences["phatgoose"].num_tasks == len(table["tasks"]) - 1
        assert suite.averages[other].missing == [task]
