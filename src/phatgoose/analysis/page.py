"""An analysis as a self-contained HTML page, figures included."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from phatgoose.analysis.figures import Plot
from phatgoose.analysis.summary import Analysis
from phatgoose.analysis.tables import correlations, distances, entropies, leaders, overview, own_shares
from phatgoose.report.html import write_html


def write_analysis_page(path: Path, analysis: Analysis, plots: Sequence[Plot], figures: Path) -> None:
    """Write the page; an older file is replaced atomically.

    Args:
        path: the .html file.
        analysis: the analysis.
        plots: its figures.
        figures: folder with the figures' SVG files.
    """
    images = [
        {
            "section": plot.section,
            "caption": plot.caption,
            "source": _data_url(figures / f"{plot.name}.svg"),
            # size in CSS pixels at which the figure's text is as large as the page's small text
            "width": round(96 * plot.figure.get_figwidth()),
            "height": round(96 * plot.figure.get_figheight()),
        }
        for plot in plots
    ]
    write_html(
        path,
        "analysis/analysis.html.jinja",
        analysis=analysis,
        header=analysis.header,
        plots={section: [image for image in images if image["section"] == section] for section in (
            "usage", "layers", "entropy", "oracle", "similarity")},
        overview=overview(analysis),
        own=own_shares(analysis) if analysis.own else None,
        leaders=[leaders(analysis, suite) for suite in analysis.suites],
        by_kind=entropies(analysis, "kind"),
        by_layer=entropies(analysis, "layer"),
        correlations=correlations(analysis) if analysis.distance else None,
        distances=distances(analysis) if analysis.distance else None,
    )  # fmt: skip


def _data_url(path: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"
