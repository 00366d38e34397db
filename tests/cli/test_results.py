"""phatgoose compare: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
from typer.testing import CliRunner

from helpers.checks import files_of
from helpers.results import PAPER, add_paper_table, add_row
from phatgoose.cli import app
from phatgoose.errors import ConfigError, ResultsError

RUN = [sys.executable, "-m", "phatgoose", "compare"]


def run(*args):
    return CliRunner().invoke(app, ["compare", *map(str, args)])


def on_a_terminal(columns, *args):
    """What a terminal of that width shows."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    with subprocess.Popen(
        [*RUN, *map(str, args)], stdout=theirs, stderr=subprocess.DEVNULL, env=environment | {"TERM": "xterm"}
    ) as process:
        os.close(theirs)
        shown = bytearray()
        with contextlib.suppress(OSError):  # raised when the other end closes
            while part := os.read(ours, 65536):
                shown += part
        os.close(ours)
    assert process.returncode == 0
    return shown.decode()


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    """The paper's T0HI tables as one results folder."""
    folder = tmp_path_factory.mktemp("results")
    for table in PAPER[:3]:
        add_paper_table(folder, table)
    return folder


@pytest.fixture
def results(tmp_path):
    for task in ("rte", "cb"):
        for method, scores in {"phatgoose": [1, 1, 0, 1], "arrow": [1, 0, 0, 1], "expert:qa": [0, 0, 0, 1]}.items():
            add_row(tmp_path / "results", "t0ho", task, method, scores)
    return tmp_path / "results"


def test_table_1_is_printed(paper, tmp_path):
    result = run(paper, "--out", tmp_path / "new" / "out", "--resamples", 200)
    assert result.exit_code == 0
    rows = {}
    for line in result.stdout.split("t0ho: averages")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("│").split("│")]
        if cells[0].isdigit():
            rows[cells[1].removesuffix(" ‡")] = cells[2:]
    for method in PAPER[0]["averages"]:
        published = [table["averages"][method] for table in PAPER[:3]]
        printed = rows["phatgoose" if method == "PHATGOOSE" else method]
        assert [float(score) for score in printed] == published
    assert sorted(file.name for file in (tmp_path / "new" / "out").iterdir()) == ["comparison.html", "comparison.md"]
    assert "comparison.md" in result.stderr


def test_markdown(results):
    assert run(results).exit_code == 0
    text = (results / "comparison.md").read_text()
    assert "| 1 | phatgoose | **75.0 [" in text
    assert "| Oracle ‡ | 25.0 |" in text
    assert "| arrow | −25.0 |" in text
    assert "| 0/2/0 | 2 |" in text
    assert "| rte | accuracy | **75.0** | 50.0 |" in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {len(line.split(" | ")) for line in tables if "accuracy" in line} == {6}


def test_names_are_literal_in_markdown(tmp_path):
    for method in ("phatgoose", "a|b*c_d <i>[x](y)`", "[bold]rich[/bold]"):
        add_row(tmp_path, "t0ho", "rte", method, [1, 0])
    result = run(tmp_path)
    assert "[bold]rich[/bold]" in result.stdout
    text = (tmp_path / "comparison.md").read_text()
    assert r"a\|b\*c\_d \<i\>[x\](y)\`" in text


def test_json(results):
    result = run(results, "--json", "--resamples", 200, "--confidence", 0.9, "--seed", 3)
    value = json.loads(result.stdout)
    assert value["bootstrap"] == {"num_resamples": 200, "confidence": 0.9, "seed": 3}
    assert value["methods"] == ["phatgoose", "arrow", "Best Individual", "Oracle"]
    (suite,) = value["suites"]
    assert suite["scores"]["arrow"] == {"cb": 0.5, "rte": 0.5}
    assert suite["averages"]["phatgoose"]["score"] == 0.75
    assert suite["differences"]["arrow"]["score"] == -0.25
    assert suite["differences"]["arrow"]["losses"] == 2
    interval = suite["averages"]["phatgoose"]["over_examples"]
    assert 0 <= interval["low"] <= 0.75 <= interval["high"] <= 1
    assert {choice["expert"] for choice in value["choices"]} == {"qa"}
    assert run(results, "--json", "--resamples", 200, "--confidence", 0.9, "--seed", 3).stdout == result.stdout


def test_every_expert_on_demand(results):
    assert "expert:qa" not in run(results).stdout
    assert "expert:qa ‡" in run(results, "--experts").stdout


@pytest.mark.parametrize("columns", [80, pytest.param(120, marks=pytest.mark.slow)])
def test_tables_fit_the_terminal(paper, tmp_path, columns):
    shown = on_a_terminal(columns, paper, "--out", tmp_path, "--resamples", 200)
    lines = [line.rstrip() for line in shown.splitlines()]
    plain = [
        "".join(part.partition("m")[2] if i else part for i, part in enumerate(line.split("\x1b["))) for line in lines
    ]
    assert max(len(line) for line in plain) <= columns
    assert not any("…" in line for line in plain)
    # each of the 22 tasks with a column for each of the 9 methods, in as many parts as it takes
    parts = [line for line in plain if line.startswith("│ ObjCnt ")]
    assert sum(line.count("│") - 3 for line in parts) == 9
    # the best usable method on T0HO
    assert any("phatgoose" in line and "\x1b[1m" in line and "56.9" in line for line in lines)


def test_torn_row_is_told(results):
    path = results / "rows.jsonl"
    with path.open("a") as file:
        file.write('{"format": 1, "sui')
    result = run(results)
    assert result.exit_code == 0
    assert f"{path}, line 7 is incomplete" in result.stderr


def test_bad_input(results, tmp_path):
    (tmp_path / "file").write_text("")
    before = files_of(tmp_path)
    cases = [
        (ResultsError, (tmp_path / "none",), "is not a results folder"),
        (ResultsError, (results, "--against", "lag"), "no results of method 'lag'"),
        (ResultsError, (results, "--suite", "bbl"), "no results of suite 'bbl'"),
        (ResultsError, (results, "--out", tmp_path / "file"), "cannot be written to"),
        (ConfigError, (results, "--resamples", 5), "too few resamples"),
        (ConfigError, (results, "--confidence", 2), "confidence must lie"),
        (ConfigError, (results, "--seed", -1), "seed is out of range"),
    ]
    for error, args, words in cases:
        result = run(*args)
        assert type(result.exception) is error, args
        assert words in str(result.exception)
        assert result.stdout == ""
    assert files_of(tmp_path) == before


def test_without_scipy(results, tmp_path):
    (tmp_path / "scipy").mkdir()
    (tmp_path / "scipy" / "__init__.py").write_text("raise ImportError('not built for this machine')")
    result = subprocess.run(
        [*RUN, str(results)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: compare needs scipy")
    assert "phatgoose[eval]" in result.stderr
    assert "not built" in result.stderr


def test_help_is_light():
    code = "import sys, phatgoose.cli; print(*(name for name in ('numpy', 'scipy', 'torch') if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"
