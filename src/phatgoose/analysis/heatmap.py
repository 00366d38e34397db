"""Heat maps as matplotlib figures, with cells large enough for their labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from phatgoose.analysis.style import MAP, MARK

# in inches: total width of the columns; least and largest width of a cell; its height
COLUMNS_WIDTH, NARROWEST, WIDEST, HEIGHT = 8.7, 0.225, 0.6, 0.2
# least width of a cell with room for its number, in inches
NUMBERED = 0.4


@dataclass(frozen=True, kw_only=True, eq=False)
class Heatmap:
    """A matrix to draw.

    Attributes:
        values: shape (rows, columns); NaN cells are grey.
        rows, columns: labels.
        title: title of the figure.
        label: label of the colour bar.
        row_name, column_name: labels of the axes.
        lowest, highest: ends of the colour bar; None for the largest value.
        boxes, dots: (row, column) of cells to mark.
        column_boxes: columns to mark.
        decimals: decimals of the numbers in cells.
    """

    values: NDArray[np.float64]
    rows: Sequence[str]
    columns: Sequence[str]
    title: str
    label: str
    row_name: str
    column_name: str
    lowest: float = 0.0
    highest: float | None = None
    boxes: Sequence[tuple[int, int]] = ()
    dots: Sequence[tuple[int, int]] = ()
    column_boxes: Sequence[int] = ()
    decimals: int = 0

    def figure(self) -> Figure:
        """Draw the heat map."""
        num_rows, num_columns = self.values.shape
        width = min(WIDEST, max(NARROWEST, COLUMNS_WIDTH / num_columns))
        # about 0.065 inches per letter of a label, and the colour bar
        left, below = (0.5 + 0.068 * max(map(len, names)) for names in (self.rows, self.columns))
        size = (max(5.0, num_columns * width + left + 1.0), max(1.9, num_rows * HEIGHT + below + 0.5))
        figure = Figure(figsize=size, layout="constrained")
        axis = figure.subplots()
        colours = matplotlib.colormaps[MAP].with_extremes(bad="#d9d9d9")
        largest = float(np.nanmax(self.values)) if np.isfinite(self.values).any() else 1.0
        highest = largest if self.highest is None else self.highest
        image = axis.imshow(
            np.ma.masked_invalid(self.values),
            cmap=colours,
            vmin=self.lowest,
            vmax=max(highest, self.lowest + 1e-9),
            aspect="auto",
            interpolation="nearest",
        )
        axis.set_title(self.title, loc="left")
        axis.set_xlabel(self.column_name)
        axis.set_ylabel(self.row_name)
        axis.set_xticks(range(num_columns), self.columns, rotation=90, fontsize=8)
        axis.set_yticks(range(num_rows), self.rows, fontsize=8)
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        # thin white lines separate cells of equal colour
        axis.set_xticks(np.arange(-0.5, num_columns), minor=True)
        axis.set_yticks(np.arange(-0.5, num_rows), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="minor", length=0)
        self._mark(axis)
        if width >= NUMBERED:
            self._number(axis, image)
        figure.colorbar(image, ax=axis, label=self.label, fraction=0.025, pad=0.012, aspect=30).outline.set_visible(
            False
        )
        return figure

    def _mark(self, axis: Any) -> None:
        for row, column in self.boxes:
            axis.add_patch(_box(row - 0.5, column - 0.5, 1))
        for column in self.column_boxes:
            axis.add_patch(_box(-0.5, column - 0.5, len(self.rows)))
        if self.dots:
            rows, columns = zip(*self.dots, strict=True)
            axis.scatter(columns, rows, s=26, facecolor="none", edgecolor=MARK, linewidth=1.3, zorder=3)

    def _number(self, axis: Any, image: Any) -> None:
        for (row, column), value in np.ndenumerate(self.values):
            if np.isfinite(value):
                red, green, blue, _ = image.cmap(image.norm(value))
                dark = 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.5
                text = f"{value:.{self.decimals}f}"
                colour = "white" if dark else "black"
                axis.text(column, row, text, ha="center", va="center", fontsize=7, color=colour)


def _box(bottom: float, left: float, height: float) -> Rectangle:
    return Rectangle((left, bottom), 1, height, fill=False, edgecolor=MARK, linewidth=1.3, zorder=3, clip_on=False)
