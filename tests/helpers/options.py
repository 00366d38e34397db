"""What every command takes, read from Typer: names, types and defaults of arguments and options."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer


def parameters_of(app: typer.Typer) -> dict[str, dict[str, Any]]:
    """Parameters by name for each command ("train", "pool add", ...; "" is the program itself)."""
    return {
        name: {name_of(parameter): describe(parameter) for parameter in command.params}
        for name, command in walk(typer.main.get_command(app), "")
    }


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, f"{path} {name}".strip())


def name_of(parameter: Any) -> str:
    """Such as "DATA" for an argument, "--html/--no-html" for an option."""
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return "/".join([*parameter.opts, *parameter.secondary_opts])


def describe(parameter: Any) -> dict[str, Any]:
    default = parameter.default() if callable(parameter.default) else parameter.default
    return {
        "type": type_of(parameter.type_descriptor.annotation),
        "required": parameter.required,
        "many": parameter.nargs == -1 or parameter.multiple,
        "default": str(default) if isinstance(default, Path) else default,
    }


def type_of(annotation: Any) -> Any:
    """A name, or the list of choices."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    if get_origin(annotation) is list:
        return type_of(get_args(annotation)[0])
    return annotation.__name__
