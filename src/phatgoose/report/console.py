"""Tables on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from phatgoose.report.tables import Table

# Of a table that no terminal limits.
WIDE = 200


def print_table(console: Console, table: Table) -> None:
    """Print a table, in as many parts as the width asks for."""
    from rich.table import Table as RichTable
    from rich.text import Text

    head = table.short_head or table.head
    texts = [head, *([entry.text for entry in row] for row in table.rows)]
    if sum(_widths(texts)) >= console.width:
        # an interval takes less room below its average than beside it
        texts = [[text.replace(" [", "\n[").replace(" (", "\n(") for text in row] for row in texts]
    widths = _widths(texts)
    fixed = table.split_from
    parts = [list(range(fixed))]
    for i in range(fixed, len(head)):
        if len(parts[-1]) > fixed and sum(widths[j] for j in [*parts[-1], i]) >= console.width:
            parts.append(list(range(fixed)))
        parts[-1].append(i)
    for part in parts:
        shown = RichTable(title=Text(table.title), title_justify="left")
        for i in part:
            shown.add_column(Text(texts[0][i]), justify="right" if table.numeric[i] else "left", overflow="fold")
        for row, line in zip(table.rows, texts[1:], strict=True):
            shown.add_row(*(Text(line[i], style="bold" if row[i].bold else "") for i in part))
        console.print(shown)
    for note in table.notes:
        console.print(note, style="dim", markup=False, highlight=False)
    console.print()


def _widths(texts: list[list[str]]) -> list[int]:
    """Width of each column with its frame."""
    return [3 + max(len(line) for text in column for line in text.split("\n")) for column in zip(*texts, strict=True)]
