"""The rules of CONTRIBUTING.md that can be read off the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import pytest

import phatgoose

SOURCE = Path(phatgoose.__file__).parent
TESTS = Path(__file__).parent
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
CONTAINERS = (ast.Dict, ast.List, ast.Set, ast.DictComp, ast.ListComp, ast.SetComp)
CONTAINER_TYPES = ("dict", "list", "set", "defaultdict", "deque", "Counter", "OrderedDict")
CHANGES = ("add", "append", "clear", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update")
# A line makes sense alone: "scale: Factor of the update", not "scale: Of the update".
LEANS = r"(of|that|likewise|whose)\b"


@cache
def trees(folder: Path) -> list[tuple[Path, ast.Module]]:
    files = sorted(folder.rglob("*.py"))
    return [(path.relative_to(folder), ast.parse(path.read_text(encoding="utf-8"))) for path in files]


def nodes(folder: Path, *kinds: type[ast.AST]) -> Iterator[tuple[str, Any]]:
    for path, tree in trees(folder):
        for node in ast.walk(tree):
            if isinstance(node, kinds):
                yield f"{path}:{getattr(node, 'lineno', 1)}", node


def check(offences: list[str]) -> None:
    assert not offences, "\n".join(offences)


def test_files_are_short() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    check([f"{path}: {count}" for path, count in lines.items() if count > 400])
    assert median(lines.values()) <= 150


def test_files_have_a_noun() -> None:
    check([str(path) for path, _ in trees(SOURCE) if path.stem in ("utils", "util", "helpers", "common", "misc")])


def test_no_globals() -> None:
    check([where for where, _ in nodes(SOURCE, ast.Global)])


def test_no_function_changes_its_module_or_another() -> None:
    """Neither a list, dictionary or set of the module, nor an attribute of something imported (but for sys.argv)."""
    offences = []
    for path, tree in trees(SOURCE):
        containers, imported = containers_of(tree), imported_names(tree)
        for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
            names = {name for node in ast.walk(function) for name in changed(node, containers, imported)}
            offences += [f"{path}:{function.lineno}: {name}" for name in names - local_names(function)]
    check(offences)


def containers_of(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            made = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) in CONTAINER_TYPES
            if made or isinstance(node.value, CONTAINERS):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def imported_names(tree: ast.Module) -> set[str]:
    imports = (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))
    return {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names} - {"sys"}


def local_names(function: Any) -> set[str]:
    names = {node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    return names | {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}


def changed(node: ast.AST, containers: set[str], imported: set[str]) -> set[str]:
    """Names of `containers` that a statement changes, and of `imported` whose attributes or items it sets."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
        return {getattr(node.func.value, "id", "")} & containers
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    else:
        return set()
    parts = [target.value for target in targets if isinstance(target, ast.Subscript | ast.Attribute)]
    return {getattr(part, "id", "") for part in parts} & (containers | imported)


def test_no_hooks_on_modules() -> None:
    hooks = re.compile(r"register_\w*hook")
    check([where for where, node in nodes(SOURCE, ast.Attribute) if hooks.fullmatch(node.attr)])


def test_tests_import_no_tests() -> None:
    """What they share is in helpers, and fixtures are in conftest.py."""
    other = re.compile(r"(.*\.)?(test_\w+|conftest)")
    imports = [(where, node.module or "") for where, node in nodes(TESTS, ast.ImportFrom)]
    imports += [(where, alias.name) for where, node in nodes(TESTS, ast.Import) for alias in node.names]
    check([where for where, name in imports if other.fullmatch(name)])


def test_helpers_hold_no_fixtures() -> None:
    functions = nodes(TESTS / "helpers", ast.FunctionDef)
    check([where for where, node in functions if any("fixture" in ast.unparse(d) for d in node.decorator_list)])


@pytest.mark.parametrize("kind", [ast.Module, ast.ClassDef, ast.FunctionDef], ids=["modules", "classes", "functions"])
def test_entries_of_docstrings_make_sense_alone(kind: type[ast.AST]) -> None:
    entry = re.compile(rf"\s+[\w*`]+(, [\w*`]+)*: +{LEANS}", re.IGNORECASE)
    docstrings = ((where, ast.get_docstring(node, clean=False) or "") for where, node in nodes(SOURCE, kind))
    check([f"{where}: {line.strip()}" for where, text in docstrings for line in text.splitlines() if entry.match(line)])


def test_helps_of_options_make_sense_alone() -> None:
    helps = ((where, node.value) for where, node in nodes(SOURCE / "cli", ast.keyword) if node.arg == "help")
    texts = ((where, getattr(value, "value", "")) for where, value in helps)
    check([f"{where}: {text}" for where, text in texts if re.match(LEANS, str(text), re.IGNORECASE)])
