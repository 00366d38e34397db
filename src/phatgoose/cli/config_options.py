"""Command-line options made from the fields of config dataclasses.

    @config_options
    def train(*, out: Out, config: AdapterTrainingConfig, device: Device = None) -> None: ...

has, in the place of `config`, one option per field of AdapterTrainingConfig,
with the field's type and default, and its description in `Attributes:` as help.
The command is called with the dataclass that the options make.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any, get_args, get_type_hints

import typer

_ATTRIBUTE = re.compile(r"^    (\w+): (.+(?:\n {8}.+)*)", re.MULTILINE)


class Fields:
    """Limits the options of a config to some fields: `Annotated[TextConfig, Fields("separator")]`.

    Args:
        names: fields whose option has the field's name.
        renamed: field -> name of its option, as a parameter name.
    """

    def __init__(self, *names: str, **renamed: str) -> None:
        self.options = dict(zip(names, names, strict=True)) | renamed


def described(config: type, name: str, *declarations: str) -> Any:
    """A typer option with the description of a config's field as help, for use in `Annotated`.

    Args:
        config: a dataclass whose docstring describes its fields in `Attributes:`.
        name: the field.
        declarations: the option's flags, if they differ from the parameter's name.
    """
    return typer.Option(*declarations, help=_description(config, name))


def config_options(command: Callable[..., None]) -> Callable[..., None]:
    """Replace each keyword-only parameter that is a config dataclass by one parameter per field, for typer."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, _Group] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        group = _group(hints[name])
        if group is None:
            parameters.append(parameter.replace(annotation=hints[name]))
        else:
            groups[name] = group
            parameters.extend(group.parameters())

    @functools.wraps(command)
    def run(**values: Any) -> None:
        configs = {name: group.build(values) for name, group in groups.items()}
        command(**values, **configs)

    del run.__wrapped__  # typer would look behind the new signature
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@dataclass(frozen=True)
class _Group:
    """The options of one config: its class, and field -> parameter name."""

    config: type
    options: dict[str, str]

    def parameters(self) -> Iterator[inspect.Parameter]:
        """One keyword-only parameter per option, annotated for typer."""
        types = get_type_hints(self.config)
        for field in _own_fields_first(self.config):
            if field.name not in self.options:
                continue
            assert field.default is not MISSING, f"{self.config.__name__}.{field.name} has no default"
            name = self.options[field.name]
            # a switch that is off by default needs no --no-... to turn it off
            flags = [f"--{name.replace('_', '-')}"] if field.default is False else []
            option = described(self.config, field.name, *flags)
            yield inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[types[field.name], option],
            )

    def build(self, values: dict[str, Any]) -> Any:
        """Make the config from its options, which are taken out of `values`. Raises ConfigError."""
        return self.config(**{field: values.pop(name) for field, name in self.options.items()})


def _group(hint: Any) -> _Group | None:
    config, *extras = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    if not (isinstance(config, type) and is_dataclass(config)):
        return None
    for extra in extras:
        if isinstance(extra, Fields):
            return _Group(config, extra.options)
    return _Group(config, {field.name: field.name for field in fields(config)})


def _own_fields_first(config: type) -> list[Field[Any]]:
    """What sets a config apart from its base class heads the help."""
    inherited = {name for base in config.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
    return sorted(fields(config), key=lambda field: field.name in inherited)


def _description(config: type, name: str) -> str | None:
    """First sentence of a field's entry in `Attributes:`; None if there is none (or no docstrings, with -OO)."""
    for cls in config.__mro__:
        entries = dict(_ATTRIBUTE.findall(inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2]))
        if name in entries:
            return re.split(r"(?<=\.)\s", " ".join(entries[name].split()))[0]
    return None
