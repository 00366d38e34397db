"""What recordings say, against numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from helpers.checks import fails
from helpers.recordings import (
    BEST,
    EXPERTS,
    SCORES,
    SITES,
    TASKS,
    evaluate,
    make_recording,
    pool_of,
    right,
    task_routing,
)
from helpers.results import add_row
from phatgoose.analysis.oracle_distance import ALL, FLOOR
from phatgoose.analysis.site_grid import SiteGrid
from phatgoose.analysis.summary import analyse
from phatgoose.analysis.tables import (
    correlations,
    distances,
    entropies,
    leaders,
    markdown,
    overview,
    own_shares,
    to_json,
)
from phatgoose.config import BootstrapConfig
from phatgoose.errors import ResultsError
from phatgoose.results.correlation import correlate
from phatgoose.results.reader import read_results

FAST = BootstrapConfig(num_resamples=500)
HELD_IN = {
    ("held-in", "a"): [0.7, 0.1, 0.1, 0.1],
    ("held-in", "b"): [0.1, 0.3, 0.5, 0.1],
    ("held-in", "c"): [0.25, 0.25, 0.3, 0.2],
}


def texts(table: Any) -> list[list[str]]:
    return [[entry.text for entry in row] for row in table.rows]


@pytest.mark.parametrize(
    ("sites", "encoder_decoder", "layers", "kinds"),
    [
        (SITES, False, ["0", "1"], ["q_proj", "up_proj"]),
        (
            [
                f"transformer.h.{i}.{k}"
                for i in range(2)
                for k in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            ],
            False,
            ["0", "1"],
            ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
        ),
        (
            [
                "encoder.block.0.layer.0.SelfAttention.q",
                "encoder.block.0.layer.1.DenseReluDense.wo",
                "decoder.block.0.layer.0.SelfAttention.q",
                "decoder.block.0.layer.1.EncDecAttention.q",
            ],
            True,
            ["encoder 0", "decoder 0"],
            ["SelfAttention.q", "wo", "EncDecAttention.q"],
        ),
        (
            ["layers.3.experts.0.up", "layers.3.experts.1.up", "layers.3.gate", "lm_head"],
            False,
            ["3", "lm_head"],
            ["up", "gate", "lm_head"],
        ),
    ],
)
def test_layers_and_kinds(sites: list[str], encoder_decoder: bool, layers: list[str], kinds: list[str]) -> None:
    grid = SiteGrid(sites, encoder_decoder=encoder_decoder)
    assert (grid.layers, grid.kinds) == (layers, kinds)


def test_grid_means() -> None:
    grid = SiteGrid(["layers.0.experts.0.up", "layers.0.experts.1.up", "layers.0.gate", "layers.1.gate"])
    values = np.array([[1.0, 3.0, 5.0, 7.0], [1.0, np.nan, 5.0, np.nan]])
    np.testing.assert_array_equal(grid.cells(values), [[[2, 5], [np.nan, 7]], [[1, 5], [np.nan, np.nan]]])
    np.testing.assert_array_equal(grid.by_layer(values), [[3, 7], [3, np.nan]])


def test_usage_and_own_share(tmp_path: Path) -> None:
    found = analyse([make_recording(tmp_path / "0", HELD_IN)])
    np.testing.assert_allclose(found.suites[0].usage_RTE[0], list(HELD_IN.values()), atol=1e-3)
    table = own_shares(found)
    assert texts(table) == [
        ["a", "70.0", "1", "", ""],
        ["b", "30.0", "2", "c", "50.0"],
        ["c", "30.0", "1", "", ""],
    ]
    assert "Mean over the tasks: 43.3" in table.notes[0]
    assert "would be 25.0" in table.notes[0]
    assert "leads in 2 of 3 tasks" in table.notes[0]
    assert texts(leaders(found, found.suites[0]))[1][:3] == ["b", "c 50.0", "b 30.0"]
    in_use = math.exp(-0.7 * math.log(0.7) - 0.3 * math.log(0.1))
    assert texts(leaders(found, found.suites[0]))[0][4] == f"{in_use:.1f}"


def test_layers_are_means_over_kinds(tmp_path: Path) -> None:
    weights_ME = np.zeros((4, 4))
    for m, row in enumerate(([1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0.5, 0.5])):
        weights_ME[m] = row
    found = analyse([make_recording(tmp_path / "0", {("t0ho", "rte"): weights_ME})])
    np.testing.assert_array_equal(found.suites[0].layers_RTLE[0, 0], [[0.5, 0.5, 0, 0], [0, 0, 0.75, 0.25]])
    np.testing.assert_array_equal(found.suites[0].usage_RTE[0, 0], [0.25, 0.25, 0.375, 0.125])
    # per site: 0, 0, 0 and log 2
    np.testing.assert_allclose(found.suites[0].entropies["usage"].nats_RLK[0], [[0, 0], [0, math.log(2)]], atol=1e-9)
    np.testing.assert_allclose(found.suites[0].entropies["usage"].share_RLK[0], [[0, 0], [0, 0.5]], atol=1e-9)


def test_entropies_are_shares_of_what_is_possible(tmp_path: Path) -> None:
    uneven = task_routing(
        "leave-one-out",
        "a",
        [0, 1 / 3, 1 / 3, 1 / 3],
        entropy_all_M=np.array([0.0, 0.2, 0.4, 0.6]),
        entropy_chosen_M=np.array([0.1, 0.1, 0.1, 0.5]),
        usable_M=np.array([3.0, 3.0, 2.0, 1.0]),
    )
    found = analyse([make_recording(tmp_path / "0", {("leave-one-out", "a"): uneven})]).suites[0].entropies
    log2, log3 = math.log(2), math.log(3)
    np.testing.assert_allclose(found["scores"].nats_RLK[0], [[0, 0.2], [0.4, 0.6]], atol=1e-3)
    # where one expert is left, there is nothing to be unsure of
    np.testing.assert_allclose(found["scores"].share_RLK[0], [[0, 0.2 / log3], [0.4 / log2, np.nan]], atol=1e-3)
    np.testing.assert_allclose(
        found["chosen"].share_RLK[0], [[0.1 / log2, 0.1 / log2], [0.1 / log2, np.nan]], atol=1e-3
    )
    np.testing.assert_allclose(found["usage"].share_RLK[0, 0], [1, 1], atol=1e-3)


def test_a_router_that_takes_all(tmp_path: Path) -> None:
    """Its weights' largest entropy is log E, whatever its unused top_k says."""
    even = task_routing("t0ho", "rte", [0.25] * 4, entropy_chosen_M=np.full(4, math.log(4)))
    folder = make_recording(tmp_path / "0", {("t0ho", "rte"): even}, router={"router": "uniform", "top_k": 2})
    np.testing.assert_allclose(analyse([folder]).suites[0].entropies["chosen"].share_RLK, 1, atol=1e-3)


def test_seeds_are_averaged_and_spread(tmp_path: Path) -> None:
    shares = (0.5, 0.6, 0.7)
    folders = []
    for seed, share in enumerate(shares):
        routing = task_routing("held-in", "a", [share, 1 - share, 0, 0], entropy_all_M=np.full(4, share))
        folders.append(make_recording(tmp_path / str(seed), {("held-in", "a"): routing}, seed))
    found = analyse(folders)
    assert found.seeds == [0, 1, 2]
    assert found.pools == ["pool0", "pool1", "pool2"]
    assert found.own[0].share == pytest.approx(0.6, abs=1e-3)
    assert found.own[0].share_sd == pytest.approx(0.1, abs=1e-3)
    assert texts(own_shares(found))[0][1] == "60.0 ± 10.0"
    for table in (overview(found), entropies(found, "kind"), entropies(found, "layer")):
        row = texts(table)[0]
        assert "0.60 ± 0.10" in row
        assert f"{100 * 0.6 / math.log(4):.1f} ± {100 * 0.1 / math.log(4):.1f}" in row
    assert [row[0] for row in texts(entropies(found, "kind"))] == ["q_proj", "up_proj"]
    assert [row[0] for row in texts(entropies(found, "layer"))] == ["0", "1"]


def recorded(folder: Path, seed: int = 0, **changes: Any) -> Path:
    return make_recording(folder, {("t0ho", task): weights for task, weights in TASKS.items()}, seed, **changes)


def test_distance_from_the_oracle(tmp_path: Path) -> None:
    rows, _ = read_results([evaluate(tmp_path / "results")])
    found = analyse([recorded(tmp_path / "0")], rows, bootstrap=FAST)
    assert found.notes == []
    points = {point.task: point for point in found.distance.points}
    usage = {task: TASKS[task][EXPERTS.index(BEST[task])] for task in TASKS}
    for task, point in points.items():
        assert point.experts == [BEST[task]]
        assert point.kl == pytest.approx(-math.log(max(usage[task], FLOOR)), abs=2e-3)
        assert point.score == SCORES[task] / 10
        assert point.to_oracle == pytest.approx(SCORES[task] / 10 - 0.7)
        assert point.to_base == pytest.approx(SCORES[task] / 10 - 0.3)
        assert point.kl_sd is None
    assert points["wic"].kl == pytest.approx(9.21, abs=0.01)  # the floor
    kls = [points[task].kl for task in TASKS]
    scores = [SCORES[task] for task in TASKS]
    for name in ("score", "to_oracle", "to_base"):
        one = found.distance.correlations["t0ho"][name]
        assert one.pearson == pytest.approx(stats.pearsonr(kls, scores).statistic)
        assert one.spearman == pytest.approx(stats.spearmanr(kls, scores).statistic)
        assert one.pearson_interval.low <= one.pearson <= one.pearson_interval.high
        assert one.num_tasks == 5
    assert list(found.distance.correlations) == ["t0ho"]
    assert found.heatmaps == [("t0ho", task) for task in ("rte", "wsc", "cb", "wic")]
    assert "nearest to the Oracle's choice" in found.heatmaps_why
    assert texts(distances(found))[0] == ["t0ho/rte", "a", "40.0", "0.92", "50.0", "−20.0", "+20.0"]
    assert texts(correlations(found))[0][:3] == ["t0ho", "score", "5"]
    assert "Pearson −0.2" in correlations(found).notes[0]


def test_each_seed_has_its_own_oracle(tmp_path: Path) -> None:
    folders = [evaluate(tmp_path / "r0"), evaluate(tmp_path / "r1", 1)]
    # in the second pool, d is even better on rte
    add = tmp_path / "r1" / "rows.jsonl"
    lines = [json.loads(line) for line in add.read_text().splitlines()]
    add.write_text("")
    for line in lines:
        if (line["task"], line["method"]) == ("rte", "expert:d"):
            add_row(tmp_path / "r1", "t0ho", "rte", "expert:d", right(9), seed=1, pool=pool_of(1))
        else:
            with add.open("a") as file:
                file.write(json.dumps(line) + "\n")
    rows, _ = read_results(folders)
    found = analyse([recorded(tmp_path / "0"), recorded(tmp_path / "1", 1)], rows, bootstrap=FAST)
    point = found.distance.points[0]
    kls = [-math.log(0.4), -math.log(0.2)]
    assert point.experts == ["a", "d"]
    assert point.kl == pytest.approx(np.mean(kls), abs=2e-3)
    assert point.kl_sd == pytest.approx(np.std(kls, ddof=1), abs=2e-3)
    assert point.to_oracle == pytest.approx(0.5 - 0.8)


def test_all_held_out_suites_together(tmp_path: Path) -> None:
    tasks = {(suite, task): weights for suite in ("t0ho", "bbh") for task, weights in TASKS.items()}
    tasks |= HELD_IN
    evaluate(tmp_path / "results", suite="t0ho")
    rows, _ = read_results([evaluate(tmp_path / "results", suite="bbh")])
    found = analyse([make_recording(tmp_path / "0", tasks)], rows, bootstrap=FAST)
    assert {name: one["score"].num_tasks for name, one in found.distance.correlations.items()} == {
        "t0ho": 5, "bbh": 5, ALL: 10,
    }  # fmt: skip
    assert {point.suite for point in found.distance.points} == {"t0ho", "bbh"}


def test_leave_one_out_has_an_oracle_among_the_others(tmp_path: Path) -> None:
    for expert in EXPERTS[1:]:
        add_row(
            tmp_path / "r", "leave-one-out", "a", f"expert:{expert}", right(7 if expert == "c" else 2), pool=pool_of(0)
        )
    add_row(tmp_path / "r", "leave-one-out", "a", "phatgoose", right(5), pool=pool_of(0))
    rows, _ = read_results([tmp_path / "r"])
    found = analyse([make_recording(tmp_path / "0", {("leave-one-out", "a"): [0, 0.2, 0.5, 0.3]})], rows)
    assert found.distance.points[0].experts == ["c"]
    assert found.distance.points[0].kl == pytest.approx(math.log(2))
    assert found.distance.points[0].to_base is None
    assert found.distance.correlations == {"leave-one-out": {}}
    assert texts(distances(found))[0][-1] == "–"


@pytest.mark.parametrize("what", ["no results", "an expert is missing", "another pool", "another router"])
def test_without_what_the_oracle_needs(tmp_path: Path, what: str) -> None:
    rows: list[Any] = []
    if what != "no results":
        skip = ("c",) if what == "an expert is missing" else ()
        changes = {"pool": "f" * 64} if what == "another pool" else {}
        rows, _ = read_results([evaluate(tmp_path / "results", skip=skip, **changes)])
    method = {"method": "arrow"} if what == "another router" else {}
    found = analyse([recorded(tmp_path / "0", **method)], rows)
    assert found.distance is None
    assert "left out for 5 of 5 held-out tasks" in found.notes[0]
    command = f'phatgoose eval --pool POOL --suite t0ho --router "{method.get("method", "phatgoose")},base,experts"'
    assert command in found.notes[0]
    # most concentrated and least
    assert found.heatmaps == [("t0ho", task) for task in ("wic", "cb", "rte", "copa")]
    assert "fewest experts" in found.heatmaps_why


def test_correlation() -> None:
    rng = np.random.default_rng(5)
    x_T, y_T = rng.standard_normal(30), rng.standard_normal(30)
    y_T[3] = y_T[4]
    found = correlate(x_T, x_T + y_T, FAST)
    assert found.pearson == pytest.approx(stats.pearsonr(x_T, x_T + y_T).statistic)
    assert found.spearman == pytest.approx(stats.spearmanr(x_T, x_T + y_T).statistic)
    assert found == correlate(x_T, x_T + y_T, FAST)
    for value, interval in ((found.pearson, found.pearson_interval), (found.spearman, found.spearman_interval)):
        assert 0 < interval.low < value < interval.high < 1
    assert math.isnan(correlate(x_T, np.ones(30), FAST).pearson)
    assert correlate(x_T, np.ones(30), FAST).pearson_interval is None
    assert correlate(x_T[:3], y_T[:3], FAST).pearson_interval is None
    # four tasks: some resamples are of one task only
    few = correlate(x_T[:4], y_T[:4], FAST).pearson_interval
    assert -1.001 < few.low < few.high < 1.001


def test_similar_experts(tmp_path: Path) -> None:
    """a and b share tasks, c and d share others."""
    tasks = {("t0ho", "rte"): [0.5, 0.5, 0, 0], ("t0ho", "cb"): [0, 0, 0.5, 0.5], ("t0ho", "wic"): [0.4, 0.2, 0.2, 0.2]}
    found = analyse([make_recording(tmp_path / "0", tasks)])
    columns = np.array(list(tasks.values())).T
    for e in range(4):
        for f in range(4):
            cosine = columns[e] @ columns[f] / np.linalg.norm(columns[e]) / np.linalg.norm(columns[f])
            assert found.similarity_EE[e, f] == pytest.approx(cosine, abs=1e-3)
    order = found.similarity_order
    assert abs(order.index(0) - order.index(1)) == abs(order.index(2) - order.index(3)) == 1


def test_chosen_heatmaps(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "0")
    assert analyse([folder], heatmaps=["t0ho/copa", "t0ho/copa"]).heatmaps == [("t0ho", "copa")]
    fails(ResultsError, "'bbh/copa'", "t0ho/rte, t0ho/cb", action=lambda: analyse([folder], heatmaps=["bbh/copa"]))


def test_json_is_json_and_says_what_tables_say(tmp_path: Path) -> None:
    rows, _ = read_results([evaluate(tmp_path / "results")])
    weights_ME = np.tile([0.4, 0.3, 0.2, 0.1], (4, 1))
    weights_ME[3] = np.nan  # a layer that no token passed
    tasks = {("t0ho", task): weights for task, weights in TASKS.items()}
    found = analyse([make_recording(tmp_path / "0", {**tasks, ("bbh", "snarks"): weights_ME})], rows, bootstrap=FAST)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    read = json.loads(json.dumps(to_json(found)), parse_constant=refuse)
    assert read["suites"]["t0ho"]["usage"]["mean"][0] == pytest.approx(TASKS["rte"], abs=1e-3)
    assert read["suites"]["t0ho"]["usage"]["sd"] is None
    assert read["suites"]["bbh"]["usage"]["mean"][0] == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=1e-3)
    assert read["suites"]["bbh"]["entropy"]["usage"]["nats"]["mean"][1][1] is None
    assert read["distance"]["points"][0]["experts"] == ["a"]
    assert set(read["distance"]["correlations"]["t0ho"]) == {"score", "to_oracle", "to_base"}
    text = markdown(found)
    assert text.count("\n## ") == 7
    assert "| t0ho | 5 | 1.00 | 72.1 | 0.50 | 72.1 |" in text
    assert "bbh/snarks" in text  # in the note on what is left out


def test_tasks_that_a_recording_lacks(tmp_path: Path) -> None:
    few = {("t0ho", task): TASKS[task] for task in ("rte", "cb")}
    found = analyse([recorded(tmp_path / "0"), make_recording(tmp_path / "1", few, 1)])
    assert found.suites[0].tasks == ["rte", "cb"]
    assert found.notes[0] == "Left out, because not all recordings have them: t0ho/copa, t0ho/wic, t0ho/wsc."


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"seed": 0}, "the same pool, with the same seed"),
        ({"method": "arrow"}, "differ in method"),
        ({"experts": ("a", "b", "c", "e")}, "differ in experts"),
        ({"limit": 7}, "differ in limit"),
        ({"sites": SITES[::-1]}, "differ in sites"),
    ],
)
def test_recordings_that_do_not_belong_together(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folders = [recorded(tmp_path / "0"), recorded(tmp_path / "1", **{"seed": 1} | changes)]
    fails(ResultsError, words, action=lambda: analyse(folders))


def test_other_rows_or_other_tasks(tmp_path: Path) -> None:
    other = task_routing("t0ho", "rte", TASKS["rte"], data="e" * 64)
    folders = [recorded(tmp_path / "0"), make_recording(tmp_path / "1", {("t0ho", "rte"): other}, 1)]
    fails(ResultsError, "different rows of t0ho/rte", action=lambda: analyse(folders))
    strange = make_recording(tmp_path / "2", {("bbh", "snarks"): TASKS["rte"]}, 1)
    fails(ResultsError, "no task in common", action=lambda: analyse([folders[0], strange]))
    empty = make_recording(tmp_path / "3", {})
    fails(ResultsError, "no finished task", action=lambda: analyse([empty]))
    fails(ResultsError, "no recording", action=lambda: analyse([tmp_path / "nothing"]))
