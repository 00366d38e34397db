"""What the pages say is so: links, commands, flags, files, modules, messages and blocks of code."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import phatgoose
from helpers.cli import run
from helpers.models import llama, make_base
from helpers.pages import PAGES, ROOT, anchors, blocks, commands, links, prose, shell_lines, spans
from helpers.pools import fill_pool, make_expert
from phatgoose import Pool, load_base
from phatgoose.cli import app

SOURCE = ROOT / "src" / "phatgoose"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
EXTENDING = ROOT / "docs" / "extending.md"
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        # a site cannot show a folder
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


@every_page
def test_commands_and_flags_exist(page: Path) -> None:
    wrong = [problem for command in commands(page) for problem in problems(command)]
    assert wrong == []


def problems(command: str) -> Iterator[str]:
    """What is wrong with `phatgoose ...`, `make ...` and `python FILE ...` in a command line."""
    if match := re.search(r"(?:^|-m |[A-Z_]=\S+ )phatgoose ((?:[a-z]|--)[^&]*)", command):
        yield from phatgoose_problems(match[1])
    if match := re.fullmatch(r"make ([a-z-]+)", command):
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        if match[1] not in targets:
            yield command
    if match := re.search(r"\bpython ((?:benchmarks|recipes|examples)/[\w/.]+)(.*)", command):
        yield from script_problems(ROOT / match[1], match[2])


def phatgoose_problems(text: str) -> Iterator[str]:
    """Commands and flags behind `phatgoose` that it does not have; `a | b | c` are alternatives."""
    first, *others = text.split(" | ")
    words = shlex.split(first)
    siblings: dict[str, Any] = {}
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        siblings, name = command.commands, words.pop(0)
        if name not in siblings:
            yield f"{name!r} of phatgoose {text}"
            return
        command = siblings[name]
    yield from (f"{other!r} of phatgoose {text}" for other in others if other.split()[0] not in siblings)
    if command.name == "lm-eval":
        return
    known = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    for word in words:
        if word.startswith("--") and word.partition("=")[0] not in {*known, "--help"}:
            yield f"{word!r} of phatgoose {text}"


def script_problems(script: Path, arguments: str) -> Iterator[str]:
    """A script that is not there, or flags that it, or the folder that it is, does not name."""
    files = sorted(script.glob("*.py")) if script.is_dir() else [script]
    if not files or not files[0].is_file():
        yield str(script)
        return
    texts = "".join(file.read_text() for file in [*files, *(ROOT / "benchmarks").glob("*.py")])
    yield from (f"{flag} of {script}" for flag in re.findall(r"--[a-z][\w-]*", arguments) if f'"{flag}"' not in texts)


@every_page
def test_files_and_modules_exist(page: Path) -> None:
    missing = [span for span in spans(page) if not exists(span)]
    assert missing == []


def exists(span: str) -> bool:
    """Whether a span that looks like a file or a module of ours is one; True for others."""
    if re.fullmatch(r"(src|docs|tests|benchmarks|recipes|examples|demo)(/[\w.-]+)+/?", span):
        return (ROOT / span).exists()
    if re.fullmatch(r"[\w/]+\.py", span):
        folders = (SOURCE, ROOT / "benchmarks")
        return any(True for folder in folders for _ in folder.rglob(span))
    if re.fullmatch(r"phatgoose(\.\w+)+", span):
        return resolves(span)
    return True


def resolves(name: str) -> bool:
    """Whether a dotted name is a module, or something in one."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return hasattr(importlib.import_module(module), attribute)
    return True


def test_messages_in_troubleshooting_are_printed() -> None:
    """The left column of its tables: part of a text in the source."""
    texts = {
        node.value
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    messages = re.findall(r"^\| `([^`]+)` \|", prose(ROOT / "docs" / "troubleshooting.md"), re.MULTILINE)
    assert len(messages) > 20
    assert [message for message in messages if not any(message in text for text in texts)] == []


def test_architecture_names_every_package() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    entries = {path.name.removesuffix(".py") for path in SOURCE.iterdir() if not path.name.startswith("_")}
    packages = {entry for entry in entries if (SOURCE / entry).is_dir() or (SOURCE / f"{entry}.py").is_file()}
    packages.discard("py.typed")
    named = {
        name
        for row in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", text, re.MULTILINE)
        for name in re.findall(r"\w+", row)
    }
    assert named == packages


def test_architecture_has_the_rows_of_test_layers() -> None:
    tree = ast.parse((ROOT / "tests" / "test_layers.py").read_text(encoding="utf-8"))
    assignments = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    rows = re.findall(r"^\| \d+ \| (.*) \|$", ARCHITECTURE.read_text(encoding="utf-8"), re.MULTILINE)
    assert [tuple(re.findall(r"\w+", row)) for row in rows] == list(ast.literal_eval(assignments["LAYERS"]))


def test_reading_order_is_about_as_long_as_it_says() -> None:
    rows = re.findall(r"\]\(\.\./(\S+\.py)\) \| (\d+) \|", ARCHITECTURE.read_text(encoding="utf-8"))
    assert len(rows) == 8
    for file, said in rows:
        lines = len((ROOT / file).read_text(encoding="utf-8").splitlines())
        assert abs(lines - int(said)) <= 25, f"{file} has {lines} lines"


def test_reference_has_every_public_name() -> None:
    names = re.findall(r"^::: phatgoose\.(\w+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    assert set(phatgoose.__all__) <= set(names)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a base, adapters and the pools that the pages speak of."""
    monkeypatch.chdir(tmp_path)
    make_base(llama, tmp_path / "tiny-llama")
    experts = [make_expert(llama, tmp_path / "adapters" / name, i) for i, name in enumerate(("rte", "samsum", "boolq"))]
    for folder in ("my-pool", "pool"):
        fill_pool(tmp_path / folder, "tiny-llama", experts[:2])
    return tmp_path


@pytest.mark.parametrize("page", ["README.md", "docs/routers.md", "docs/extending.md"])
def test_python_blocks_run(page: str, here: Path) -> None:
    """One after the other, in one namespace."""
    sources = [block.text for block in blocks(ROOT / page) if block.language == "python"]
    assert sources
    names = {name: getattr(phatgoose, name) for name in phatgoose.__all__}
    names |= {"__name__": "page", "base": load_base("tiny-llama"), "pool": Pool.open("pool")}
    for source in sources:
        exec(compile(source.replace('"BASE"', '"tiny-llama"'), page, "exec"), names)


@pytest.mark.slow  # lm-eval reads the index of all its tasks first
def test_files_and_commands_of_extending_work(here: Path) -> None:
    """Each titled block is a file; each command then runs."""
    ran = 0
    for block in blocks(EXTENDING):
        if block.title:
            file = here / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text)
        elif block.language == "sh":
            for line in shell_lines(block.text):
                program, *arguments = shlex.split(line)
                assert program == "phatgoose"
                result = run(*arguments)
                assert result.code == 0, result.err
                ran += 1
    assert ran == 2
