"""Figures: that they are there, that they are not blank, and that colours say the numbers."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image

from helpers.checks import files_of
from helpers.recordings import EXPERTS, TASKS, evaluate, make_recording, task_routing
from phatgoose.analysis.figures import Plot, draw, remove_older, save
from phatgoose.analysis.heatmap import Heatmap
from phatgoose.analysis.summary import Analysis, analyse
from phatgoose.config import BootstrapConfig
from phatgoose.results.reader import read_results


@pytest.fixture(scope="module")
def analysis(tmp_path_factory: pytest.TempPathFactory) -> Analysis:
    folder = tmp_path_factory.mktemp("analysis")
    tasks = {("t0ho", task): weights for task, weights in TASKS.items()}
    tasks |= {("held-in", "c"): [0.1, 0.2, 0.6, 0.1], ("held-in", "a"): [0.5, 0.2, 0.2, 0.1]}
    tasks |= {("leave-one-out", "a"): [0.0, 0.5, 0.3, 0.2], ("leave-one-out", "b"): [0.4, 0.0, 0.3, 0.3]}
    folders = []
    for seed in range(2):
        falling = {
            key: task_routing(*key, w, entropy_all_M=np.linspace(1.2, 0.6 + 0.1 * seed, 4)) for key, w in tasks.items()
        }
        folders.append(make_recording(folder / str(seed), falling, seed))
    rows, _ = read_results([evaluate(folder / "r0"), evaluate(folder / "r1", 1)])
    return analyse(folders, rows, bootstrap=BootstrapConfig(num_resamples=200))


@pytest.fixture(scope="module")
def plots(analysis: Analysis) -> dict[str, Plot]:
    return {plot.name: plot for plot in draw(analysis)}


@pytest.mark.slow
def test_what_is_drawn(plots: dict[str, Plot], tmp_path: Path) -> None:
    assert list(plots) == [
        *("usage_t0ho", "usage_held-in", "usage_leave-one-out"),
        *("layers_t0ho_rte", "layers_t0ho_wsc", "layers_t0ho_cb", "layers_t0ho_wic"),
        *("entropy_suites", "entropy_kinds", "oracle_distance", "similarity"),
    ]
    for plot in plots.values():
        save(plot, tmp_path)
        assert "mean over 2 training seeds" in plot.caption
        pixels = np.asarray(Image.open(tmp_path / f"{plot.name}.png").convert("RGB"))
        assert min(pixels.shape[:2]) > 250
        assert len(np.unique(pixels.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32))) > 50  # colours
        assert (pixels < 250).any(axis=2).mean() > 0.01
        tree = ElementTree.parse(tmp_path / f"{plot.name}.svg")
        hrefs = [v for e in tree.iter() for k, v in e.attrib.items() if k.endswith("href")]
        assert all(href.startswith(("#", "data:image/png")) for href in hrefs)
    assert len(list(tmp_path.iterdir())) == 22


@pytest.mark.slow
def test_equal_analyses_make_equal_files(analysis: Analysis, tmp_path: Path) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        fresh = {plot.name: plot for plot in draw(analysis)}
        for name in ("usage_held-in", "oracle_distance"):
            save(fresh[name], folder)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")


def labels(figure: Figure) -> tuple[list[str], list[str]]:
    axis = figure.axes[0]
    return [t.get_text() for t in axis.get_yticklabels()], [t.get_text() for t in axis.get_xticklabels()]


def test_usage_map(plots: dict[str, Plot]) -> None:
    figure = plots["usage_held-in"].figure
    assert labels(figure) == (["c", "a"], list(EXPERTS))
    image = figure.axes[0].images[0]
    np.testing.assert_allclose(image.get_array(), [[10, 20, 60, 10], [50, 20, 20, 10]], atol=0.1)
    boxes = [(patch.get_y() + 0.5, patch.get_x() + 0.5) for patch in figure.axes[0].patches]
    assert boxes == [(0, 2), (1, 0)]
    left_out = plots["usage_leave-one-out"].figure.axes[0].images[0].get_array()
    assert left_out.mask.tolist() == [[True, False, False, False], [False, True, False, False]]
    circles = plots["usage_t0ho"].figure.axes[0].collections[0].get_offsets()
    assert circles.tolist() == [[0, 0], [0, 1], [1, 2], [2, 3], [1, 4]]  # column, row: BEST


def test_layer_maps_share_a_scale(plots: dict[str, Plot]) -> None:
    images = [plots[f"layers_t0ho_{task}"].figure.axes[0].images[0] for task in ("rte", "wsc", "cb", "wic")]
    assert len({image.get_clim() for image in images}) == 1
    assert images[0].get_clim() == (0, pytest.approx(60, abs=0.1))
    assert labels(plots["layers_t0ho_rte"].figure)[0] == ["0", "1"]


def test_colours_say_the_numbers(tmp_path: Path) -> None:
    """A pixel of each cell, read back from the file."""
    values = np.array([[0.0, 5.0, np.nan], [10.0, 2.5, 7.5]])
    figure = Heatmap(
        values=values, rows=["x", "$y"], columns=["a", "b", "c"], title="t", label="%", row_name="r", column_name="c"
    ).figure()
    save(Plot(name="map", section="usage", caption="", figure=figure), tmp_path)
    picture = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")) / 255
    axis = figure.axes[0]
    scale = picture.shape[1] / figure.bbox.width
    for (row, column), value in np.ndenumerate(values):
        # off the middle, where the number stands
        x, y = axis.transData.transform((column + 0.35, row - 0.3)) * scale
        found = picture[picture.shape[0] - 1 - int(y), int(x)]
        expected = (0.851,) * 3 if np.isnan(value) else colormaps["YlGnBu"](value / 10)[:3]
        np.testing.assert_allclose(found, expected, atol=0.02)
    numbers = {text.get_text() for text in axis.texts}
    assert numbers == {"0", "5", "10", "2", "8"}


def test_large_maps_keep_their_labels_apart() -> None:
    names = [f"an_expert_with_a_name_{i}" for i in range(60)]
    figure = Heatmap(
        values=np.random.default_rng(0).random((40, 60)), rows=names[:40], columns=names, title="t", label="%",
        row_name="r", column_name="c",
    ).figure()  # fmt: skip
    figure.canvas.draw()
    axis = figure.axes[0]
    for texts, side in ((axis.get_xticklabels(), 0), (axis.get_yticklabels(), 1)):
        spans = sorted((t.get_window_extent().min[side], t.get_window_extent().max[side]) for t in texts)
        assert all(first[1] <= second[0] + 0.5 for first, second in pairwise(spans))
        assert spans[0][0] >= 0


def test_entropy_lines(plots: dict[str, Plot]) -> None:
    axis = plots["entropy_suites"].figure.axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axis.get_lines()}
    assert list(lines) == ["t0ho", "held-in", "leave-one-out"]
    seeds = [np.linspace(1.2, 0.6 + 0.1 * seed, 4).reshape(2, 2).mean(axis=1) for seed in range(2)]
    np.testing.assert_allclose(lines["t0ho"], 100 * np.mean(seeds, axis=0) / np.log(4), atol=0.1)
    kinds = plots["entropy_kinds"].figure.axes[0].get_lines()
    assert [line.get_label() for line in kinds] == ["q_proj", "up_proj", "mean"]


def test_older_figures_go(plots: dict[str, Plot], tmp_path: Path) -> None:
    save(plots["layers_t0ho_rte"], tmp_path)
    (tmp_path / "mine.png").write_bytes(b"")
    remove_older(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.png"]


def test_names_cannot_leave_the_folder(tmp_path: Path) -> None:
    folder = make_recording(tmp_path / "0", {("t0ho", "../../rte"): TASKS["rte"]})
    names = [plot.name for plot in draw(analyse([folder]))]
    assert "layers_t0ho_______rte" in names


def test_one_seed_one_layer_no_choice(tmp_path: Path) -> None:
    """What is constant, or has no entropy at all, is still drawn."""
    sites = ("model.layers.0.mlp.up_proj",)
    routing = task_routing("t0ho", "rte", [[1.0, 0.0]], ("a", "b"), entropy_all_M=[0.0], entropy_chosen_M=[0.0])
    folder = make_recording(
        tmp_path / "0", {("t0ho", "rte"): routing}, sites=sites, experts=("a", "b"),
        router={"router": "retrieval", "top_k": 2},
    )  # fmt: skip
    plots = [plot for plot in draw(analyse([folder])) if plot.section in ("layers", "entropy", "similarity")]
    assert len(plots) == 4
    for plot in plots:
        save(plot, tmp_path)
        assert (tmp_path / f"{plot.name}.png").stat().st_size > 4000
