"""Tables as Markdown and on a terminal."""

from __future__ import annotations

import pytest
from rich.console import Console

from phatgoose.report.console import print_table
from phatgoose.report.tables import MINUS, Table, TableCell, escape_markdown, markdown_lines, percent


def make_table(columns: int = 2) -> Table:
    head = ["method", *(f"column {i}" for i in range(1, columns))]
    rows = [[TableCell("a|b"), *(TableCell(f"{i}.5 [1, 2]", bold=i == 1) for i in range(1, columns))]]
    numeric = [False, *[True] * (columns - 1)]
    return Table(title="A *title*", head=head, numeric=numeric, rows=rows, notes=["a_note"], split_from=1)


def test_markdown() -> None:
    assert markdown_lines(make_table()) == [
        r"## A \*title\*",
        "",
        "| method | column 1 |",
        "| --- | ---: |",
        r"| a\|b | **1.5 [1, 2]** |",
        "",
        r"a\_note",
    ]


def test_only_links_escape_brackets() -> None:
    assert escape_markdown("[1, 2] [x](y) `<a>` ~") == r"[1, 2] [x\](y) \`\<a\>\` \~"


@pytest.mark.parametrize(
    ("fraction", "sign", "text"),
    [(0.1234, False, "12.3"), (-0.1, True, f"{MINUS}10.0"), (0.1, True, "+10.0"), (-0.0001, True, "0.0")],
)
def test_percent(fraction: float, sign: bool, text: str) -> None:
    assert percent(fraction, sign) == text


def test_a_narrow_terminal_repeats_the_first_columns(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(Console(width=40), make_table(columns=6))
    text = capsys.readouterr().out
    assert text.count("method") == text.count("a|b") > 1
    assert all(text.count(f"column {i}") == 1 for i in range(1, 6))
    assert max(map(len, text.splitlines())) <= 40

    print_table(Console(width=200), make_table(columns=6))
    assert capsys.readouterr().out.count("method") == 1
