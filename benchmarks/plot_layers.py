"""Figures of one layer's times, from the rows of `routed_layer.py` and `peers.py`.

    python benchmarks/plot_layers.py   # docs/figures/layer_ours.svg and docs/figures/layer_peers.svg

Time over that of one static LoRA in the same run, against the number of experts; a panel for each number of tokens.
`layer_ours`: a line for each shape, the kernels that `RoutedLinear` takes for it. `layer_peers`: one shape, a line for
each method, solid for replays of a CUDA graph and dashed for plain calls.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from phatgoose.analysis.style import COLOURS, DASHES, MARKERS, STYLE, WIDTH
from phatgoose.kernels import KernelOptions
from phatgoose.kernels.cuda import settings

TOP_K = 2
STATIC, YARDSTICK = "one static LoRA", "#777777"
Rows = Sequence[Mapping[str, str]]
Point = tuple[int, float]  # experts, ratio


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what there are rows for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, default=Path("benchmarks/rows"), help="folder of the CSV files")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--device", help="as the rows name it; by default that of the last row")
    parser.add_argument("--shape", default="4096x4096", help="INPUTSxOUTPUTS, of the figure with the peers")
    parser.add_argument("--format", choices=["svg", "png"], default="svg")
    args = parser.parse_args(argv)
    for name, draw in (("routed_layer", draw_ours), ("peers", draw_peers)):
        path = args.rows / f"{name}.csv"
        rows = read(path, args.device) if path.is_file() else []
        if name == "peers":
            rows = [row for row in rows if shape_of(row) == args.shape]
        if not rows:
            print(f"{path}: no rows to draw", flush=True)
            continue
        figure = f"layer_{'ours' if name == 'routed_layer' else 'peers'}"
        with matplotlib.rc_context({**STYLE, "svg.hashsalt": figure}):
            target = args.out / f"{figure}.{args.format}"
            target.parent.mkdir(parents=True, exist_ok=True)
            metadata: Any = {"Date": None, "Creator": None} if args.format == "svg" else {"Software": None}
            draw(rows).savefig(target, format=args.format, dpi=130, metadata=metadata)
        print(target, flush=True)


def read(path: Path, device: str | None) -> Rows:
    """The rows of one device."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    wanted = device or (rows[-1]["device"] if rows else "")
    return [row for row in rows if row["device"] == wanted]


def draw_ours(rows: Rows) -> Figure:
    """Ours against the number of experts, by shape."""
    shapes = in_order(shape_of(row) for row in rows)
    figure, panels = make_panels(rows, "one routed layer")
    for tokens, panel in panels.items():
        here = [row for row in rows if int(row["tokens"]) == tokens and row["method"] == taken(row)]
        for shape, colour, marker in zip(shapes, COLOURS, MARKERS, strict=False):
            draw_line(panel, points(row for row in here if shape_of(row) == shape), color=colour, marker=marker)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, label=shape.replace("x", " → "))
        for shape, colour, marker in zip(shapes, COLOURS, MARKERS, strict=False)
    ]
    return finish(figure, panels, rows, handles)


def draw_peers(rows: Rows) -> Figure:
    """Every method against the number of experts."""
    methods = in_order(row["method"] for row in rows)
    modes = in_order(row["mode"] for row in rows)
    figure, panels = make_panels(rows, shape_of(rows[0]).replace("x", " → "))
    styles: dict[str, Any] = {"graph": DASHES[0], "eager": DASHES[1]}
    # ours is black and comes last, so that it lies on top
    methods.sort(key=lambda name: name.startswith("ours"))
    peers = [name for name in methods if not name.startswith(("ours", STATIC))]
    colours = dict(zip(peers, COLOURS, strict=False)) | {STATIC: YARDSTICK}
    markers = dict(zip(peers, MARKERS, strict=False)) | {STATIC: ""}
    for tokens, panel in panels.items():
        for method in methods:
            for mode in modes:
                here = (r for r in rows if (int(r["tokens"]), r["method"], r["mode"]) == (tokens, method, mode))
                look = {"color": colours.get(method, "#000000"), "marker": markers.get(method, "o")}
                draw_line(panel, points(here), linestyle=styles[mode], **look)
    handles = [
        Line2D([], [], color=colours.get(m, "#000000"), marker=markers.get(m, "o"), markersize=4, label=m)
        for m in methods
    ]
    words = {"graph": "replay of a CUDA graph", "eager": "plain calls"}
    handles += [Line2D([], [], color=YARDSTICK, linestyle=styles[mode], label=words[mode]) for mode in modes]
    return finish(figure, panels, rows, handles)


def make_panels(rows: Rows, title: str) -> tuple[Figure, dict[int, Any]]:
    """A figure with a panel for each number of tokens."""
    tokens = sorted({int(row["tokens"]) for row in rows})
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    panels = figure.subplots(1, len(tokens), sharey=True, squeeze=False)[0]
    figure.suptitle(f"{title}; bf16, rank 16, top-2" if "cpu" not in rows[0]["torch"] else f"{title}; a rehearsal")
    return figure, dict(zip(tokens, panels, strict=True))


def finish(figure: Figure, panels: Mapping[int, Any], rows: Rows, handles: Sequence[Line2D]) -> Figure:
    """Axes, the yardstick, a legend below."""
    experts = sorted({int(row["experts"]) for row in rows})
    for number, (tokens, panel) in enumerate(panels.items()):
        panel.axhline(1.0, color=YARDSTICK, linewidth=0.8)
        panel.set_title(f"{tokens:,} token{'s' if tokens > 1 else ''}")
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(experts, [str(n) for n in experts])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set_xlabel("experts")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        low, high = panel.get_ylim()
        # less than a decade: the lines between powers of ten need numbers
        panel.yaxis.set_minor_formatter(
            FuncFormatter(lambda value, _: f"{value:.2g}") if high < 10 * low else NullFormatter()
        )
        panel.grid(axis="y", which="both", color="#e3e3e3", linewidth=0.6)
        if number == 0:
            panel.set_ylabel("time / one static LoRA as a graph")
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 4), title=rows[0]["device"])
    return figure


def draw_line(panel: Any, found: Sequence[Point], **look: Any) -> None:
    if found:
        panel.plot(*zip(*found, strict=True), markersize=4, linewidth=1.4, **look)


def points(rows: Iterable[Mapping[str, str]]) -> list[Point]:
    return sorted((int(row["experts"]), float(row["ratio_to_one_lora"])) for row in rows)


def taken(row: Mapping[str, str]) -> str:
    """The method that `RoutedLinear` takes for a row's shape, as `routed_layer.py` calls it."""
    tokens, experts, inputs = (int(row[name]) for name in ("tokens", "experts", "inputs"))
    options = KernelOptions()
    few = not options.sorts(tokens, TOP_K)
    chosen = settings.few(tokens, experts, inputs) if few else settings.many(tokens, TOP_K, experts, inputs)
    name, pdl = f"triton, {'few' if few else 'many'}", ", pdl" if chosen.pdl else ""
    if few:
        return f"{name}, beside the base{pdl}" if options.overlap_base else name + pdl
    return f"{name}, before the base" if options.base_last else name + pdl


def shape_of(row: Mapping[str, str]) -> str:
    return f"{row['inputs']}x{row['outputs']}"


def in_order(names: Iterable[str]) -> list[str]:
    """Each once, in the order of their coming."""
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    main()
