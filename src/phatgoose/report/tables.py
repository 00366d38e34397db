"""Tables as data, independent of any output: titles, columns, cells; and their Markdown form."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
NOTHING = "–"


@dataclass(frozen=True)
class TableCell:
    """Text of one cell."""

    text: str
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table, whichever way it is printed.

    Attributes:
        title: what the table shows.
        head: column names.
        numeric: per column, whether it is aligned right.
        rows: cells, one per column of `head`.
        notes: sentences below the table.
        split_from: first column that may move to a further part on a narrow terminal; earlier ones are repeated.
        short_head: column names for a terminal; None for `head`.
    """

    title: str
    head: list[str]
    numeric: list[bool]
    rows: list[list[TableCell]]
    notes: list[str]
    split_from: int
    short_head: list[str] | None = None


def percent(fraction: float, sign: bool = False, digits: int = 1) -> str:
    """A fraction in percent, without the percent sign."""
    text = f"{100 * fraction:+.{digits}f}" if sign else f"{100 * fraction:.{digits}f}"
    # a value that rounds to zero has no sign
    return re.sub(r"^[+-](?=[0.]+$)", "", text).replace("-", MINUS)


def markdown_lines(table: Table) -> list[str]:
    """A table in GitHub's Markdown: heading, table, notes."""
    lines = [f"## {escape_markdown(table.title)}", "", _line(map(escape_markdown, table.head))]
    lines.append(_line("---:" if numeric else "---" for numeric in table.numeric))
    lines += [_line(map(_cell, row)) for row in table.rows]
    for note in table.notes:
        lines += ["", escape_markdown(note)]
    return lines


def escape_markdown(text: str) -> str:
    """Escape what Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_<>|~]|\](?=\())", r"\\\1", text)


def _cell(cell: TableCell) -> str:
    text = escape_markdown(cell.text)
    return f"**{text}**" if cell.bold else text


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
