"""Tables on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from phatgoose.report.tables import Table

# width where output does not go to a terminal, in characters
WIDE = 200


def print_table(console: Console, table: Table) -> None:
    """Print a table, split into as many parts as the console's width requires."""
    from rich.table import Table as RichTable
    from rich.text import Text

    head = table.short_head or table.head
    texts = [head, *([cell.text for cell in row] for row in table.rows)]
    if sum(_widths(texts)) >= console.width:
        # an interval takes less width below its average than beside it
        texts = [[text.replace(" [", "\n[").replace(" (", "\n(") for text in row] for row in texts]
    for columns in _parts(_widths(texts), table.split_from, console.width):
        printed = RichTable(title=Text(table.title), title_justify="left")
        for i in columns:
            printed.add_column(Text(texts[0][i]), justify="right" if table.numeric[i] else "left", overflow="fold")
        for row, line in zip(table.rows, texts[1:], strict=True):
            printed.add_row(*(Text(line[i], style="bold" if row[i].bold else "") for i in columns))
        console.print(printed)
    for note in table.notes:
        console.print(note, style="dim", markup=False, highlight=False)
    console.print()


def _parts(widths: Sequence[int], split_from: int, width: int) -> list[list[int]]:
    """Columns of each part; the first `split_from` columns are in every part."""
    parts = [list(range(split_from))]
    for i in range(split_from, len(widths)):
        if len(parts[-1]) > split_from and sum(widths[j] for j in [*parts[-1], i]) >= width:
            parts.append(list(range(split_from)))
        parts[-1].append(i)
    return parts


def _widths(texts: list[list[str]]) -> list[int]:
    """Width of each column, including its border."""
    return [3 + max(len(line) for text in column for line in text.split("\n")) for column in zip(*texts, strict=True)]
