"""An analysis as one HTML page that loads nothing: figures are part of it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from phatgoose.analysis.figures import Plot
from phatgoose.analysis.summary import Analysis
from phatgoose.analysis.tables import correlations, distances, entropies, leaders, overview, own_shares
from phatgoose.files import replacing

TEMPLATE = "analysis.html.jinja"


def write_analysis_page(path: Path, analysis: Analysis, plots: Sequence[Plot], figures: Path) -> None:
    """Write the page; an older file at `path` is replaced as one step.

    Args:
        path: of the page.
        analysis: what it shows.
        plots: of the analysis.
        figures: folder with their SVG files.
    """
    environment = Environment(
        loader=PackageLoader("phatgoose.analysis", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = [
        {
            "section": plot.section,
            "caption": plot.caption,
            "source": _data_url(figures / f"{plot.name}.svg"),
            # CSS pixels at which its text is as large as the page's small text
            "width": round(96 * plot.figure.get_figwidth()),
            "height": round(96 * plot.figure.get_figheight()),
        }
        for plot in plots
    ]
    html = environment.get_template(TEMPLATE).render(
        analysis=analysis,
        header=analysis.header,
        plots={section: [plot for plot in shown if plot["section"] == section] for section in (
            "usage", "layers", "entropy", "oracle", "similarity")},
        overview=overview(analysis),
        own=own_shares(analysis) if analysis.own else None,
        leaders=[leaders(analysis, suite) for suite in analysis.suites],
        by_kind=entropies(analysis, "kind"),
        by_layer=entropies(analysis, "layer"),
        correlations=correlations(analysis) if analysis.distance else None,
        distances=distances(analysis) if analysis.distance else None,
    )  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _data_url(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
