"""The page of a comparison in a real browser."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest

from helpers.checks import contrast
from helpers.results import add_row
from phatgoose.config import BootstrapConfig
from phatgoose.results.charts import APART, Axis, spread
from phatgoose.results.comparison import compare
from phatgoose.results.page import write_comparison_page
from phatgoose.results.reader import read_results

HOSTILE = "</td><script>document.title='owned'</script><b>"
LONG = "a_method_with_a_name_that_is_longer_than_any_router_has top_k=1"
TASKS = {
    "t0ho": ["rte", "cb", "copa", "<i>wic</i>", "a_task_with_a_very_long_name_as_some_of_big_bench_have"],
    "bbh": [f"task_{i}" for i in range(22)],
    "held-in": ["qa", "sums"],
    "leave-one-out": ["qa", "sums"],
}
LEVELS = {"phatgoose": 0.6, "base": 0.3, "arrow": 0.58, "arrow-peft": 0.58, "merged": 0.5, HOSTILE: 0.55, LONG: 0.2}


def fill(folder, seed=0):
    rng = random.Random(seed)
    for suite, tasks in TASKS.items():
        for task in tasks:
            levels = LEVELS | {"expert:qa": 0.4, "expert:sums": 0.45} | ({"own": 0.8} if suite == "held-in" else {})
            for method, level in levels.items():
                if suite == "leave-one-out" and method == f"expert:{task}":
                    continue
                if method == "merged" and task in ("rte", "qa"):
                    continue
                add_row(folder, suite, task, method, [int(rng.random() < level) for _ in range(40)])
    return folder


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    results, _ = read_results([fill(tmp_path_factory.mktemp("results"))])
    return compare(results, bootstrap=BootstrapConfig(num_resamples=500))


@pytest.fixture(scope="module")
def html(tmp_path_factory, comparison):
    path = tmp_path_factory.mktemp("page") / "comparison.html"
    write_comparison_page(path, comparison)
    return path


@pytest.fixture
def page(browser, html):
    """The open page; afterwards: it logged no error and asked for nothing but itself."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(html.as_uri())
    yield page
    page.close()
    assert troubles == []
    assert requests == [html.as_uri()]


def box(locator):
    return locator.evaluate("e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; }")


def boxes(locator):
    return locator.evaluate_all(
        "es => es.map(e => { const b = e.getBoundingClientRect(); return [b.left, b.top, b.right, b.bottom]; })"
    )


def overlaps(first, second):
    return all(min(first[i + 2], second[i + 2]) - max(first[i], second[i]) > 0.5 for i in (0, 1))


def number(text):
    return float(text.replace("−", "-"))


def test_names_are_text(page):
    assert page.title() == "Comparison: tiny"
    assert page.locator("script, td b i, th i").count() == 0
    assert page.locator(".dots .label", has_text=HOSTILE).count() == 8  # two charts of four suites


def test_main_table(page, comparison):
    table = page.locator(".numbers").first
    assert table.locator("thead th").all_text_contents() == [
        "#",
        "method",
        "t0ho (5 tasks)",
        "bbh (22 tasks)",
        "held-in (2 tasks)",
        "leave-one-out (2 tasks)",
    ]
    assert table.locator("tbody tr").count() == len(comparison.methods)
    best = [suite.best[0] for suite in comparison.suites]
    bold = table.locator("td b")
    assert bold.count() == sum(len(suite.best) for suite in comparison.suites)
    row = table.locator("tbody tr", has=page.get_by_text(best[0], exact=True))
    assert row.locator("td").nth(2).locator("b").count() == 1


def test_dots_stand_at_their_numbers(page, comparison):
    for suite, section in zip(comparison.suites, page.locator(".suite").all(), strict=True):
        for chart, values in zip(section.locator(".dots").all(), (suite.averages, suite.differences), strict=True):
            ticks = chart.locator(".tick").all()
            texts = [number(tick.text_content()) for tick in ticks]
            middles = [(b[0] + b[2]) / 2 for b in (box(tick) for tick in ticks)]
            scale = (middles[-1] - middles[0]) / (texts[-1] - texts[0])
            methods = [method for method in suite.averages if method in values]
            dots, plots = chart.locator(".dot").all(), chart.locator(".plot").all()
            assert len(dots) == len(methods)
            for method, dot, plot in zip(methods, dots, plots, strict=True):
                value = values[method]
                left, _, right, _ = box(dot)
                assert (left + right) / 2 == pytest.approx(middles[0] + (100 * value.score - texts[0]) * scale, abs=1)
                for css, interval in ((".thin", value.over_tasks), (".thick", value.over_examples)):
                    assert plot.locator(css).count() == (interval is not None)
                    if interval is None:
                        assert value.num_tasks == 1
                        continue
                    low, _, high, _ = box(plot.locator(css))
                    assert low == pytest.approx(middles[0] + (100 * interval.low - texts[0]) * scale, abs=1)
                    assert high == pytest.approx(middles[0] + (100 * interval.high - texts[0]) * scale, abs=1.5)


def test_heat_map(page, comparison):
    suite = comparison.suites[0]
    table = page.locator(".suite").first.locator(".heat")
    methods = [method for method in comparison.methods if method != "phatgoose" and method in suite.averages]
    heads = table.locator("thead th")
    assert [head.locator("div").text_content() for head in heads.all()] == methods
    assert heads.nth(methods.index("Oracle")).locator("span").text_content().strip() == "‡"
    for task, row in zip(suite.tasks, table.locator("tbody tr").all(), strict=True):
        assert row.locator("th").text_content() == task
        for method, text in zip(methods, row.locator("td").all_text_contents(), strict=True):
            if task not in suite.scores[method]:
                assert (task, method, text) == ("rte", "merged", "")
                continue
            gap = 100 * (suite.scores[method][task] - suite.scores["phatgoose"][task])
            assert number(text) == pytest.approx(gap, abs=0.05 + 1e-9)


def test_scatter(page, comparison):
    held_in = comparison.suites[2]
    figures = page.locator("figure").all()
    assert [figure.locator("h3").text_content() for figure in figures] == [
        "t0ho, percent",
        "bbh, percent",
        "leave-one-out, percent",
    ]
    figure, suite = figures[1], comparison.suites[1]
    points = figure.locator(".exact")
    names = figure.locator(".legend li span:last-child").all_text_contents()
    assert points.count() == len(names) == figure.locator(".field .chip").count()
    assert "merged" not in names
    assert "merged" in figure.locator(".note").text_content()
    axes = []
    for css, side in (("x", 0), ("y", 1)):
        ticks = figure.locator(f".field b.{css}").all()
        texts = [number(tick.text_content()) for tick in ticks]
        middles = [(b[side] + b[side + 2]) / 2 for b in (box(tick) for tick in ticks)]
        axes.append((texts[0], middles[0], (middles[-1] - middles[0]) / (texts[-1] - texts[0])))
    for name, point in zip(names, points.all(), strict=True):
        method = name.removesuffix(" ‡")
        b = box(point)
        scores = (held_in.averages[method].score, suite.averages[method].score)
        for side, ((text, middle, scale), score) in enumerate(zip(axes, scores, strict=True)):
            assert (b[side] + b[side + 2]) / 2 == pytest.approx(middle + (100 * score - text) * scale, abs=1.5)


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_nothing_overlaps_or_is_cut_off(browser, html, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(html.as_uri())
    page.locator("details").evaluate_all("all => all.forEach(details => { details.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for holder in page.locator(".ticks, .field").all():
        for css in (".tick:visible", "b.x", "b.y"):
            for first, second in itertools.combinations(boxes(holder.locator(css)), 2):
                assert not overlaps(first, second), css
        # numbers stand in circles
        for first, second in itertools.combinations(boxes(holder.locator(".chip")), 2):
            assert math.dist(first[:2], second[:2]) > first[2] - first[0] - 0.5
    for chart in page.locator(".dots").all():
        for left, middle, right in zip(
            *(boxes(chart.locator(css)) for css in (".label", ".plot", ".value")), strict=True
        ):
            assert left[2] <= middle[0]
            assert middle[2] <= right[0]
            assert middle[2] - middle[0] > 60
    for card in page.locator(".card").all():
        edge = box(card)
        for css in (".dots .value", ".tick:visible", ".field b", ".field .chip", ".note", ".scroll"):
            for inner in boxes(card.locator(css)):
                assert edge[0] <= inner[0], css
                assert inner[2] <= edge[2], css
                assert inner[3] <= edge[3], css
    # a heading of the heat map that is too long is cut with dots, not drawn over its neighbours
    for table in page.locator(".heat").all():
        heads = boxes(table.locator("thead div"))
        assert not any(overlaps(*pair) for pair in itertools.combinations(heads, 2))
    page.close()


# The colour of a cell's text and of what lies behind it, as the reader sees them.
SEEN = """
cells => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = colour => {
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  return cells.map(cell => {
    const style = getComputedStyle(cell);
    return [pixel(style.color), pixel(style.backgroundColor)];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_on_colours_can_be_read(browser, html, scheme):
    page = browser.new_page()
    page.emulate_media(color_scheme=scheme)
    page.goto(html.as_uri())
    seen = page.locator(".heat td.up, .heat td.down, .chip").evaluate_all(SEEN)
    page.close()
    assert len(seen) > 100
    assert len({tuple(background) for _, background in seen}) > 20
    for ink, background in seen:
        assert contrast(ink, background) >= 4.5


def test_one_suite_without_the_reference(tmp_path, browser):
    for suite, method in (("t0ho", "phatgoose"), ("bbh", "arrow")):
        add_row(tmp_path, suite, "a", method, [0.5])
    write_comparison_page(tmp_path / "page.html", compare(read_results([tmp_path])[0]))
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator(".suite").count() == 2
    assert page.locator(".dots").count() == 2
    assert page.locator(".heat, figure, .plot .thin, .plot .thick").count() == 0
    page.close()


def test_size(tmp_path, html):
    assert html.stat().st_size < 400_000
    text = html.read_text()
    assert "//" not in text
    assert "<script" not in text.replace(HOSTILE, "")


@pytest.mark.parametrize(
    ("values", "low", "high", "step"),
    [
        ([0.31, 0.68], 0.3, 0.7, 0.1),
        ([-0.031, 0.012], -0.04, 0.02, 0.01),
        ([0.5], 0.5, 0.502, 0.002),
        ([0.0, 1.0], 0.0, 1.0, 0.2),
    ],
)
def test_axis(values, low, high, step):
    axis = Axis.around(values)
    assert (axis.low, axis.high, axis.step) == (pytest.approx(low), pytest.approx(high), pytest.approx(step))
    ticks = axis.ticks()
    assert (ticks[0]["at"], ticks[-1]["at"]) == (0, 100)
    assert [tick["zero"] for tick in ticks].count(True) == (low <= 0 <= high)


def test_labels_of_points_that_coincide_in_a_corner_part() -> None:
    places = np.array(spread([(0.0, 0.0)] * 4 + [(100.0, 100.0)] * 3))
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1) + 1000 * np.eye(len(places))
    assert apart.min() > 0.95 * APART
