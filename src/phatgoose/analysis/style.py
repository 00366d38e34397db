"""Style of all figures.

All heat maps share one sequential colour map (light is little), so that they
also print in grey. Lines have the colours of Okabe and Ito, which colour-blind
people can tell apart, and different dashes.
"""

from __future__ import annotations

from typing import Any

MAP = "YlGnBu"
MARK = "#D55E00"
# text becomes outlines, so that an SVG looks the same everywhere
STYLE: Any = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "axes.edgecolor": "#777777",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "text.parse_math": False,  # a name may contain a $
    "figure.facecolor": "white",
}
# black comes last: it is reserved for means
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#8C6D1F", "#000000")
DASHES = ("-", (0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
# width of figures with several panels, in inches
WIDTH = 11.0
