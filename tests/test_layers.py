"""Imports point one way: a package may import only from the rows above it in `LAYERS`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import phatgoose

SOURCE = Path(phatgoose.__file__).parent
LAYERS = (
    ("errors", "files"),
    ("config", "report"),
    ("data", "kernels", "results"),
    ("experts",),
    ("models", "routers"),
    ("routing", "training"),
    ("inference",),
    ("evaluation",),
    ("analysis",),
    ("cli",),
)
ROW = {package: row for row, packages in enumerate(LAYERS) for package in packages}
# the package itself and its entry point may import anything
EXEMPT = {("__init__",), ("__main__",)}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of every module in the package."""
    found = {}
    for file in sorted(SOURCE.rglob("*.py")):
        parts = file.relative_to(SOURCE).with_suffix("").parts
        if parts not in EXEMPT:
            found[".".join(["phatgoose", *parts]).removesuffix(".__init__")] = file
    return found


MODULES = modules()


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module of ours that a tree imports, nested and type-only imports too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("phatgoose."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            source = node.module or ""
            if source == "phatgoose" or source.startswith("phatgoose."):
                for alias in node.names:
                    name = f"{source}.{alias.name}"
                    if name in MODULES:
                        yield name
                    elif source != "phatgoose":
                        yield source


def type_only(tree: ast.Module) -> set[ast.AST]:
    """The nodes below `if TYPE_CHECKING:`."""
    blocks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    ]
    return {child for block in blocks for statement in block.body for child in ast.walk(statement)}


def package(module: str) -> str:
    return module.split(".")[1]


def test_every_package_has_a_row() -> None:
    assert {package(module) for module in MODULES} == set(ROW)


def test_imports_point_one_way() -> None:
    upward = [
        f"{module} imports {target}"
        for module, file in MODULES.items()
        for target in imports(ast.parse(file.read_text(encoding="utf-8")))
        if package(target) != package(module) and ROW[package(target)] >= ROW[package(module)]
    ]
    assert upward == []


def test_no_cycles() -> None:
    """Within a package too; imports for type checkers alone do not count there."""
    graph: dict[str, set[str]] = {}
    for module, file in MODULES.items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        skipped = type_only(tree)
        kept = ast.Module(
            body=[
                node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) and node not in skipped
            ],
            type_ignores=[],
        )
        graph[module] = set(imports(kept)) - {module}
    while leaves := [module for module, targets in graph.items() if not targets & graph.keys()]:
        for leaf in leaves:
            del graph[leaf]
    # what is left lies on a cycle, or imports from one
    assert graph == {}


def test_results_load_no_torch() -> None:
    names = [name for name in MODULES if package(name) == "results"]
    code = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; print('torch' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "False"


def test_training_imports_no_routing() -> None:
    """A contributor trains without any pool; `routers` count as routing."""
    sources = [(module, file) for module, file in MODULES.items() if package(module) == "training"]
    found = [
        f"{module} imports {target}"
        for module, file in sources
        for target in imports(ast.parse(file.read_text(encoding="utf-8")))
        if package(target) in ("routing", "routers")
    ]
    assert found == []
