"""Averages, differences, bounds and seeds, against numbers worked out by hand."""

from __future__ import annotations

import math
import random
from dataclasses import asdict

import numpy as np
import pytest

from helpers.checks import fails
from helpers.results import add_row
from phatgoose.config import BootstrapConfig
from phatgoose.errors import ResultsError
from phatgoose.report.tables import percent
from phatgoose.results.bootstrap import Interval
from phatgoose.results.comparison import compare
from phatgoose.results.reader import read_results
from phatgoose.results.tables import all_tables, limits, markdown

CONFIG = BootstrapConfig(num_resamples=4000)


def fill(folder, scores, suite="t0ho", **changes):
    """`scores` is method -> task -> mean; each task has two examples, one of them with all the score it can have."""
    for method, tasks in scores.items():
        for task, score in tasks.items():
            add_row(folder, suite, task, method, two_examples(score), **changes)
    return folder


def two_examples(mean):
    return [min(1, 2 * mean), max(0, 2 * mean - 1)]


def suite_of(folder, *more, suite=0, **options):
    return compare(read_results([folder, *more])[0], bootstrap=CONFIG, **options).suites[suite]


def notes_of(folder, **options):
    return " ".join(compare(read_results([folder])[0], bootstrap=CONFIG, **options).notes)


def test_averages_and_differences(tmp_path):
    fill(
        tmp_path,
        {
            "phatgoose": {"a": 0.5, "b": 0.3, "c": 0.1, "d": 0.7},
            "arrow": {"a": 0.6, "b": 0.3, "c": 0.0, "d": 0.2},
        },
    )
    suite = suite_of(tmp_path)
    assert suite.suite == "t0ho"
    assert suite.tasks == dict.fromkeys("abcd", "accuracy")
    assert {method: average.score for method, average in suite.averages.items()} == pytest.approx(
        {"phatgoose": 0.4, "arrow": 0.275}
    )
    assert list(suite.differences) == ["arrow"]
    difference = suite.differences["arrow"]
    assert difference.score == pytest.approx(-0.125)
    assert (difference.wins, difference.losses, difference.ties, difference.num_tasks) == (1, 2, 1, 4)
    assert suite.best == ["phatgoose"]
    turned = suite_of(tmp_path, against="arrow").differences["phatgoose"]
    assert turned.score == pytest.approx(0.125)
    assert (turned.wins, turned.losses, turned.ties) == (2, 1, 1)
    assert turned.over_tasks.low == pytest.approx(-difference.over_tasks.high, abs=1e-12)
    assert turned.over_examples.high == pytest.approx(-difference.over_examples.low, abs=1e-12)


def test_sums_in_another_order_are_a_tie(tmp_path):
    numbers = [0.1, 0.2, 0.3]
    assert sum(numbers) != sum(reversed(numbers))
    add_row(tmp_path, "t0ho", "a", "phatgoose", numbers)
    add_row(tmp_path, "t0ho", "a", "arrow", numbers[::-1])
    difference = suite_of(tmp_path).differences["arrow"]
    assert (difference.wins, difference.losses, difference.ties) == (0, 0, 1)
    assert set(suite_of(tmp_path).best) == {"arrow", "phatgoose"}


def test_a_constant_difference_is_sure(tmp_path):
    rng = random.Random(0)
    for task in "abc":
        scores = [rng.random() / 2 for _ in range(30)]
        add_row(tmp_path, "t0ho", task, "phatgoose", scores)
        add_row(tmp_path, "t0ho", task, "arrow", [score + 0.25 for score in scores])
    difference = suite_of(tmp_path).differences["arrow"]
    for interval in (difference.over_examples, difference.over_tasks):
        assert (interval.low, interval.high) == (pytest.approx(0.25), pytest.approx(0.25))


def test_interval_over_examples_of_a_macro_average(tmp_path):
    """Normal limits, with the variance of a mean of independent means."""
    rng = np.random.default_rng(0)
    variance = gap_variance = 0.0
    sizes = {"a": 400, "b": 900, "c": 250}
    for task, size in sizes.items():
        ours = rng.integers(0, 2, size).astype(float)
        theirs = np.where(rng.random(size) < 0.3, 1 - ours, ours)
        add_row(tmp_path, "t0ho", task, "phatgoose", ours.tolist())
        add_row(tmp_path, "t0ho", task, "arrow", theirs.tolist())
        variance += ours.var() / size / len(sizes) ** 2
        gap_variance += (theirs - ours).var() / size / len(sizes) ** 2
    suite = suite_of(tmp_path)
    for value, expected in ((suite.averages["phatgoose"], variance), (suite.differences["arrow"], gap_variance)):
        sd = math.sqrt(expected)
        # four standard errors of a limit of that many draws, and half a step of the smallest score for its discreteness
        density = math.exp(-(1.96**2) / 2) / math.sqrt(2 * math.pi)
        error = 4 * math.sqrt(0.025 * 0.975 / CONFIG.num_resamples) / density * sd + 0.5 / 900 / 3
        assert value.over_examples.low == pytest.approx(value.score - 1.96 * sd, abs=error)
        assert value.over_examples.high == pytest.approx(value.score + 1.96 * sd, abs=error)


def test_one_example_in_a_task_leaves_the_interval_open(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5, "b": 0.3}, "arrow": {"a": 0.4, "b": 0.2}})
    for method in ("phatgoose", "arrow"):
        add_row(tmp_path, "t0ho", "c", method, [0.5])
    suite = suite_of(tmp_path)
    assert suite.averages["arrow"].over_examples is None
    assert suite.differences["arrow"].over_examples is None
    assert suite.differences["arrow"].over_tasks is not None
    fill(tmp_path / "one", {"phatgoose": {"a": 0.5}, "arrow": {"a": 0.4}})
    suite = suite_of(tmp_path / "one")
    assert suite.differences["arrow"].over_tasks is None
    assert suite.differences["arrow"].over_examples is not None


def test_a_method_that_lacks_tasks(tmp_path):
    fill(
        tmp_path,
        {
            "phatgoose": {"a": 0.5, "b": 0.3, "c": 0.1},
            "arrow": {"a": 0.6, "c": 0.4},
            "spectr": {"b": 0.4},
            "lag": {"a": 0.45, "b": 0.3, "c": 0.1},
        },
    )
    suite = suite_of(tmp_path)
    assert suite.averages["arrow"].missing == ["b"]
    assert suite.averages["arrow"].score == pytest.approx(0.5)
    assert suite.differences["arrow"].score == pytest.approx(0.2)  # (0.6 - 0.5 + 0.4 - 0.1) / 2
    assert suite.differences["arrow"].num_tasks == 2
    assert suite.best == ["phatgoose"]  # spectr and arrow are higher, on fewer tasks
    against = suite_of(tmp_path, against="spectr")
    assert "b" in against.scores["spectr"]
    assert "arrow" not in against.differences  # no task that both have
    assert against.differences["lag"].num_tasks == 1
    text = markdown(compare(read_results([tmp_path])[0], bootstrap=CONFIG))
    assert "† 2 of 3" in text
    assert "lacks tasks of the suite" in text
    assert "| arrow † |" in text


def test_reference_without_a_suite(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5}, "arrow": {"a": 0.4}})
    fill(tmp_path, {"arrow": {"x": 0.4}, "lag": {"x": 0.1}}, suite="bbh")
    suite = suite_of(tmp_path, suite=1)
    assert suite.differences == {}
    assert suite.best == ["arrow"]
    assert "phatgoose has no results on bbh." in notes_of(tmp_path)


EXPERTS = {
    "expert:qa": {"a": 0.9, "b": 0.1, "c": 0.5},
    "expert:sums": {"a": 0.2, "b": 0.8, "c": 0.4},
    "expert:both": {"a": 0.6, "b": 0.6, "c": 0.5},
}


def test_oracle_and_best_individual(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5, "b": 0.3, "c": 0.1}, **EXPERTS})
    comparison = compare(read_results([tmp_path])[0], bootstrap=CONFIG)
    (suite,) = comparison.suites
    assert suite.scores["Oracle"] == pytest.approx({"a": 0.9, "b": 0.8, "c": 0.5})
    assert suite.scores["Best Individual"] == pytest.approx(EXPERTS["expert:both"])
    assert list(suite.averages) == ["Oracle", "Best Individual", "phatgoose"]
    assert [average.uses_labels for average in suite.averages.values()] == [True, True, False]
    assert suite.best == ["phatgoose"]
    chosen = {(choice.method, choice.task): choice.expert for choice in comparison.choices}
    # of two equally good experts the first by name
    assert chosen == {
        ("Oracle", "a"): "qa",
        ("Oracle", "b"): "sums",
        ("Oracle", "c"): "both",
        ("Best Individual", None): "both",
    }
    assert {choice.num_experts for choice in comparison.choices} == {3}
    assert comparison.notes == []
    assert comparison.methods == ["phatgoose", "Oracle", "Best Individual"]
    # every table says what they are
    for table in all_tables(comparison):
        texts = [*table.head, *(entry.text for row in table.rows for entry in row)]
        assert "Oracle ‡" in texts
        assert "phatgoose ‡" not in texts


def test_single_experts_are_listed_on_demand(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5, "b": 0.3, "c": 0.1}, **EXPERTS})
    suite = suite_of(tmp_path, experts=True)
    assert suite.averages.keys() == {"phatgoose", "Oracle", "Best Individual", *EXPERTS}
    assert suite.averages["expert:qa"].uses_labels
    assert suite_of(tmp_path, experts=True, against="expert:qa").differences["phatgoose"].wins == 1


def test_experts_that_lack_tasks(tmp_path):
    experts = {**EXPERTS, "expert:sums": {"a": 0.2, "b": 0.8}}
    fill(tmp_path / "some", {"phatgoose": {"a": 0.5, "b": 0.3, "c": 0.1}, **experts})
    suite = suite_of(tmp_path / "some")
    assert suite.scores["Oracle"] == pytest.approx({"a": 0.9, "b": 0.8, "c": 0.5})
    notes = notes_of(tmp_path / "some")
    assert "Oracle on t0ho had only 2 of 3 experts" in notes
    assert "Best Individual on t0ho was chosen among 2 of 3 experts" in notes
    # leave-one-out: each expert lacks its own task
    fill(
        tmp_path / "out",
        {
            "phatgoose": {"qa": 0.5, "sums": 0.3},
            "expert:qa": {"sums": 0.25},
            "expert:sums": {"qa": 0.4},
        },
        suite="leave-one-out",
    )
    suite = suite_of(tmp_path / "out")
    assert suite.scores["Oracle"] == pytest.approx({"qa": 0.4, "sums": 0.25})
    assert "Best Individual" not in suite.averages
    assert "Best Individual on leave-one-out is missing: no expert has all its tasks (seed 0)." in notes_of(
        tmp_path / "out"
    )
    # a task that no expert was run on: Oracle lacks it, too
    fill(tmp_path / "none", {"phatgoose": {"a": 0.5, "b": 0.3}, "expert:qa": {"a": 0.9}})
    assert suite_of(tmp_path / "none").averages["Oracle"].missing == ["b"]


def test_own_expert_is_no_method_to_use(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5}, "own": {"a": 0.9}}, suite="held-in")
    suite = suite_of(tmp_path)
    assert suite.averages["own"].uses_labels
    assert suite.best == ["phatgoose"]


def test_training_seeds(tmp_path):
    scores = {
        0: {"phatgoose": {"a": 0.5, "b": 0.3}, "arrow": {"a": 0.4, "b": 0.4}, "base": {"a": 0.2, "b": 0.2}},
        1: {"phatgoose": {"a": 0.6, "b": 0.4}, "arrow": {"a": 0.1, "b": 0.5}},
        2: {"phatgoose": {"a": 0.7, "b": 0.2}, "arrow": {"a": 0.4, "b": 0.3}},
    }
    folders = [fill(tmp_path / str(s), scores[s], seed=s, pool=str(s) * 64, pool_name=f"pool {s}") for s in scores]
    suite = suite_of(*folders)
    phatgoose, arrow = suite.averages["phatgoose"], suite.averages["arrow"]
    assert suite.scores["phatgoose"] == pytest.approx({"a": 0.6, "b": 0.3})
    assert phatgoose.score == pytest.approx(0.45)
    assert phatgoose.seeds == [0, 1, 2]
    assert phatgoose.seed_sd == pytest.approx(np.std([0.4, 0.5, 0.45], ddof=1))
    assert arrow.seed_sd == pytest.approx(np.std([0.4, 0.3, 0.35], ddof=1))
    # seed by seed: -0, -0.2, -0.1
    assert suite.differences["arrow"].seed_sd == pytest.approx(np.std([0, -0.2, -0.1], ddof=1))
    assert suite.differences["arrow"].wins == 1  # on b, 0.4 against 0.3 over the seeds
    assert suite.averages["base"].seed_sd is None
    assert suite.differences["base"].seed_sd is None
    assert suite.differences["base"].score == pytest.approx(-0.25)
    # the interval over examples is that of the mean over seeds
    for method in ("phatgoose", "arrow"):
        for task in "ab":
            mean = np.mean([two_examples(scores[seed][method][task]) for seed in scores], axis=0)
            add_row(tmp_path / "mean", "t0ho", task, method, mean.tolist())
    alone = suite_of(tmp_path / "mean").differences["arrow"].over_examples
    both = suite.differences["arrow"].over_examples
    assert (both.low, both.high) == (pytest.approx(alone.low), pytest.approx(alone.high))
    assert compare(read_results(folders)[0], bootstrap=CONFIG).notes == []


def test_each_seed_has_its_own_oracle(tmp_path):
    for seed, experts in enumerate(({"qa": 0.9, "sums": 0.1}, {"qa": 0.2, "sums": 0.4})):
        scores = {f"expert:{name}": {"a": score} for name, score in experts.items()}
        fill(tmp_path / str(seed), {"phatgoose": {"a": 0.5}, **scores}, seed=seed, pool=str(seed) * 64)
    comparison = compare(read_results([tmp_path / "0", tmp_path / "1"])[0], bootstrap=CONFIG)
    assert comparison.suites[0].averages["Oracle"].score == pytest.approx(0.65)
    chosen = {choice.seed: choice.expert for choice in comparison.choices if choice.method == "Oracle"}
    assert chosen == {0: "qa", 1: "sums"}


def test_uneven_seeds_are_told(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5, "b": 0.3}, "arrow": {"a": 0.5, "b": 0.3}})
    fill(tmp_path, {"phatgoose": {"a": 0.7}}, seed=1)
    assert "phatgoose on t0ho has not the same seeds for all tasks." in notes_of(tmp_path)
    suite = suite_of(tmp_path)
    # on a, the only task with both seeds
    assert suite.averages["phatgoose"].seed_sd == pytest.approx(np.std([0.5, 0.7], ddof=1))


def test_order_of_rows_changes_nothing(tmp_path):
    rng = random.Random(0)
    for method in ("phatgoose", "arrow", "expert:qa", "expert:sums", "base"):
        for task in "abcd":
            add_row(tmp_path, "t0ho", task, method, [rng.randint(0, 1) for _ in range(20)])
    results, _ = read_results([tmp_path])
    expected = asdict(compare(results, bootstrap=CONFIG))
    assert asdict(compare(results, bootstrap=CONFIG)) == expected
    rng.shuffle(results)
    assert asdict(compare(results, bootstrap=CONFIG)) == expected
    # nor does another method
    fewer = compare([result for result in results if result.method != "base"], bootstrap=CONFIG).suites[0]
    full = expected["suites"][0]["differences"]["arrow"]["over_examples"]
    assert asdict(fewer.differences["arrow"].over_examples) == pytest.approx(full)


def test_suites(tmp_path):
    for suite in ("bbh", "t0ho"):
        fill(tmp_path, {"phatgoose": {"a": 0.5}, "arrow": {"a": 0.4}}, suite=suite)
    results, _ = read_results([tmp_path])
    named = [part.suite for part in compare(results, suites=["t0ho", "bbh", "t0ho"], bootstrap=CONFIG).suites]
    assert named == ["t0ho", "bbh"]
    assert [part.suite for part in compare(results, bootstrap=CONFIG).suites] == ["bbh", "t0ho"]
    fails(ResultsError, "'bbl'", "bbh, t0ho", action=lambda: compare(results, suites=["bbl"], bootstrap=CONFIG))
    fails(ResultsError, "'lag'", "arrow", "--against", action=lambda: compare(results, against="lag"))


def test_numbers_as_people_read_them():
    assert [percent(share) for share in (0, 0.5, 1, 0.12345, -0.2)] == ["0.0", "50.0", "100.0", "12.3", "−20.0"]
    assert [percent(share, sign=True) for share in (0.0, 0.0004, -0.0004, 0.1, -0.1)] == [
        "0.0",
        "0.0",
        "0.0",
        "+10.0",
        "−10.0",
    ]
    assert limits(None) == "–"
    # an interval that leaves out zero does not look as if it ended there
    assert limits(Interval(-0.036, -0.0004)) == "[−3.6, −0.0]"
    assert limits(Interval(-0.036, 0.0004)) == "[−3.6, 0.0]"


def test_common_tasks_are_those_of_all_methods_and_seeds(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5, "b": 0.3, "c": 0.1}, "arrow": {"a": 0.6, "b": 0.2}}, seed=0)
    fill(tmp_path, {"phatgoose": {"a": 0.7, "b": 0.3}, "arrow": {"b": 0.2}}, seed=1)
    fill(tmp_path, {"phatgoose": {"x": 0.5}}, suite="bbh", seed=0)
    suite = suite_of(tmp_path, common=True)
    assert list(suite.tasks) == ["b"]
    assert suite.averages["phatgoose"].score == pytest.approx(0.3)
    notes = notes_of(tmp_path, common=True)
    assert "t0ho: only the 1 of 3 tasks that all methods have." in notes
    assert "bbh: only" not in notes
    assert set(suite_of(tmp_path).tasks) == {"a", "b", "c"}


def test_no_common_task_is_an_error(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5}, "arrow": {"b": 0.2}})
    fails(ResultsError, "no task of suite 't0ho'", "--common", action=lambda: suite_of(tmp_path, common=True))


def chance_folder(folder):
    """Task "hard" is at chance for all methods that can be used, "easy" is not."""
    right, half = [1.0] * 30, [1.0, 0.0] * 15
    for method, easy, hard in (("phatgoose", right, half), ("arrow", half, half), ("expert:e", half, right)):
        add_row(folder, "t0ho", "easy", method, easy)
        add_row(folder, "t0ho", "hard", method, hard)
    for task in ("easy", "hard"):
        add_row(folder, "t0ho", task, "chance", [0.5] * 30)
    return folder


def test_tasks_at_chance_are_named(tmp_path):
    suite = suite_of(chance_folder(tmp_path))
    assert suite.at_chance == ["hard"]
    comparison = compare(read_results([tmp_path])[0], bootstrap=CONFIG)
    assert "No method's interval is above chance on 1 of 2 tasks: hard." in markdown(comparison)


def test_tasks_at_chance_can_be_left_out(tmp_path):
    suite = suite_of(chance_folder(tmp_path), above_chance=True)
    assert list(suite.tasks) == ["easy"]
    assert suite.averages["phatgoose"].score == 1
    assert "t0ho: without 1 tasks on which no method is better than chance (hard)." in notes_of(
        tmp_path, above_chance=True
    )


def test_a_suite_that_is_all_at_chance_is_left_out(tmp_path):
    chance_folder(tmp_path)
    for method in ("phatgoose", "chance"):
        add_row(tmp_path, "bbh", "hard", method, [0.5] * 30)
    found = compare(read_results([tmp_path])[0], bootstrap=CONFIG, above_chance=True)
    assert [part.suite for part in found.suites] == ["t0ho"]
    only = [result for result in read_results([tmp_path])[0] if result.suite == "bbh"]
    fails(ResultsError, "on any task", action=lambda: compare(only, bootstrap=CONFIG, above_chance=True))


def test_above_chance_needs_its_rows(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5}})
    assert suite_of(tmp_path).at_chance is None
    fails(ResultsError, "method 'chance'", "--router chance", action=lambda: suite_of(tmp_path, above_chance=True))


def test_differences_of_unlike_seeds_are_named(tmp_path):
    fill(tmp_path, {"phatgoose": {"a": 0.5}, "arrow": {"a": 0.4}, "spectr": {"a": 0.3}}, seed=0)
    fill(tmp_path, {"phatgoose": {"a": 0.7}, "arrow": {"a": 0.4}}, seed=1)
    notes = notes_of(tmp_path)
    assert "On t0ho phatgoose has seeds 0, 1, and others spectr: their differences are of unlike seeds." in notes
    assert "arrow" not in notes
