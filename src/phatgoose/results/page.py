"""A comparison as a self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

from phatgoose.report.html import write_html
from phatgoose.results.charts import dots, heat, scatters
from phatgoose.results.comparison import Comparison
from phatgoose.results.tables import BOUND, LACKS, main_table, suite_tables


def write_comparison_page(path: str | Path, comparison: Comparison) -> None:
    """Write the page, and create the folders above it; an older file is replaced atomically."""
    suites = [
        {
            "name": suite.suite,
            "num_tasks": len(suite.tasks),
            "averages": dots(suite, suite.averages, list(suite.averages)),
            "differences": dots(suite, suite.differences, list(suite.averages), zero=True),
            "heat": heat(comparison, suite),
            "tables": suite_tables(comparison, suite),
        }
        for suite in comparison.suites
    ]
    write_html(
        path,
        "results/comparison.html.jinja",
        comparison=comparison,
        seeds=sorted({seed for s in comparison.suites for average in s.averages.values() for seed in average.seeds}),
        confidence=f"{100 * comparison.bootstrap.confidence:g} %",
        table=main_table(comparison),
        suites=suites,
        scatters=scatters(comparison),
        bound=BOUND,
        lacks=LACKS,
    )
