"""Tables before they have a look: titles, columns and entries, and how Markdown shows them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

MINUS = "\N{MINUS SIGN}"
NOTHING = "–"


@dataclass(frozen=True)
class Entry:
    """What stands in one place of a table."""

    text: str
    bold: bool = False


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table before it has a look.

    Attributes:
        title: what it shows.
        head: names of the columns.
        numeric: which columns are set flush right.
        rows: of the same length as `head`.
        notes: sentences below it.
        split_from: a narrow terminal may show the columns from this one on in several parts.
        short_head: the head with the numbers of the main table for methods.
    """

    title: str
    head: list[str]
    numeric: list[bool]
    rows: list[list[Entry]]
    notes: list[str]
    split_from: int
    short_head: list[str] | None = None


def percent(share: float, sign: bool = False, digits: int = 1) -> str:
    """A share of 1 in per cent, without the sign of per cent."""
    text = f"{100 * share:+.{digits}f}" if sign else f"{100 * share:.{digits}f}"
    # a rounded zero has no sign
    return re.sub(r"^[+-](?=[0.]+$)", "", text).replace("-", MINUS)


def table_lines(table: Table) -> list[str]:
    """One table as GitHub reads it, with a heading."""
    lines = [f"## {plain_text(table.title)}", "", _line(map(plain_text, table.head))]
    lines.append(_line("---:" if numeric else "---" for numeric in table.numeric))
    lines += [_line(f"**{plain_text(e.text)}**" if e.bold else plain_text(e.text) for e in row) for row in table.rows]
    for note in table.notes:
        lines += ["", plain_text(note)]
    return lines


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plain_text(text: str) -> str:
    """Text in which Markdown and HTML find nothing to read."""
    return re.sub(r"([\\`*_<>|~]|\](?=\())", r"\\\1", text)
