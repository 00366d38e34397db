"""The page of an analysis in a real browser, and the commands that make it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from helpers.cli import run, succeed
from helpers.grids import grid, make_grid, recording
from helpers.recordings import TASKS, make_recording
from phatgoose.analysis.figures import draw, save
from phatgoose.analysis.page import write_analysis_page
from phatgoose.analysis.summary import analyse

HOSTILE = "<script>document.title='owned'</script>"
MANY = tuple(f"expert_number_{i}" for i in range(36))


@pytest.fixture(scope="module")
def html(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """36 experts, 30 layers, and a task with an unkind name."""
    folder = tmp_path_factory.mktemp("page")
    sites = tuple(f"model.layers.{i}.{kind}" for i in range(30) for kind in ("self_attn.q_proj", "mlp.up_proj"))
    weights = {task: [*row, *[0.0] * 32] for task, row in TASKS.items()}
    tasks = {("t0ho", HOSTILE): weights["rte"], **{("t0ho", task): row for task, row in weights.items()}}
    tasks |= {("held-in", name): [1 / 36] * 36 for name in MANY}
    shape: dict[str, Any] = {"sites": sites, "experts": MANY}
    # `make_recording` spreads a row over as many sites as there are
    tasks = {key: [row] * len(sites) for key, row in tasks.items()}
    folders = [make_recording(folder / str(seed), tasks, seed, **shape) for seed in range(2)]
    analysis = analyse(folders, heatmaps=["t0ho/wic"])
    plots = draw(analysis)
    for plot in plots:
        save(plot, folder)
    write_analysis_page(folder / "analysis.html", analysis, plots, folder)
    return folder / "analysis.html"


@pytest.fixture
def page(browser: Any, html: Path) -> Any:
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
    assert [url for url in requests if not url.startswith("data:")] == [html.as_uri()]


def test_figures_are_shown(page: Any) -> None:
    images = page.locator("figure img")
    assert images.count() == 6
    sizes = images.evaluate_all("es => es.map(e => [e.complete, e.naturalWidth, e.clientWidth, e.alt.length])")
    assert all(complete and natural > 300 and shown > 300 and alt > 60 for complete, natural, shown, alt in sizes)
    assert page.locator("figcaption").all_text_contents() == images.evaluate_all("es => es.map(e => e.alt)")


def test_names_are_text(page: Any) -> None:
    assert page.title() == "Routing: tiny"
    assert page.locator("script").count() == 0
    assert page.locator("td", has_text=HOSTILE).count() == 1


def test_tables(page: Any) -> None:
    first = page.locator(".numbers").first.locator("tbody tr")
    assert first.nth(0).locator("td").all_text_contents()[:2] == ["t0ho", "6"]
    assert page.get_by_text("would be 2.8").count() == 1
    assert page.get_by_text("phatgoose eval --pool POOL --suite t0ho").count() == 1


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_sticks_out(browser: Any, html: Path, width: int, scheme: str) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.goto(html.as_uri())
    for details in page.locator("details").all():
        details.evaluate("e => e.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == width
    # a narrow window scrolls a figure instead of shrinking its labels
    assert min(page.locator("figure img").evaluate_all("es => es.map(e => e.clientWidth / e.width)")) >= 0.8
    assert min(page.locator("figure img").evaluate_all("es => es.map(e => e.clientWidth)")) >= 450
    page.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("grid"))


@pytest.mark.slow
def test_from_a_pool_to_the_page(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    out = tmp_path / "out"
    succeed(*recording(tmp_path / "rec", "t0ho,held-in,leave-one-out"))
    succeed(*grid("phatgoose,base,experts", out=str(tmp_path / "results")))
    said = succeed("analyse", tmp_path / "rec", "--results", tmp_path / "results", "--out", out)
    assert str(out / "analysis.html") in said
    page = (out / "analysis.html").read_text()
    assert "Distance from the Oracle and performance" in page
    assert page.count("<figure") == 9
    read = json.loads((out / "analysis.json").read_text())
    assert [point["task"] for point in read["distance"]["points"]] == ["rte", "cb"]
    assert {one["task"] for one in read["own"]} == {"e0", "e1"}
    assert "## Distance from the Oracle by task" in (out / "analysis.md").read_text()
    assert "2 of 4 held-out tasks" in "".join(read["notes"])  # leave-one-out was not evaluated
    assert len(list((out / "figures").glob("*.png"))) == len(list((out / "figures").glob("*.svg"))) == 9
    again = succeed("analyse", tmp_path / "rec", "--heatmap", "held-in/e1", "--out", out)
    assert "7 figures" in again
    assert [path.name for path in (out / "figures").glob("layers_*.png")] == ["layers_held-in_e1.png"]


def test_user_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_recording(tmp_path / "rec", {("t0ho", "rte"): TASKS["rte"]})
    for arguments, words in (
        ([tmp_path, "--out", tmp_path / "out"], ["is not a recording", "phatgoose record POOL"]),
        ([made, "--out", tmp_path / "out", "--heatmap", "rte"], ["no recorded task 'rte'", "t0ho/rte"]),
        ([made, "--out", tmp_path / "out", "--results", tmp_path], ["is not a results folder"]),
    ):
        result = run("analyse", *arguments)
        assert (result.code, all(word in result.err for word in words)) == (2, True), result.err
    assert not (tmp_path / "out").exists()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else real(name))
    result = run("analyse", made, "--out", tmp_path / "out")
    assert result.code == 2
    assert "analyse needs matplotlib" in result.err
    assert "pip install 'phatgoose[analysis]'" in result.err
