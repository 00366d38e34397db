"""Prompt templates of promptsource, rendered without promptsource.

The templates in promptsource/*.yaml are those of promptsource 0.2.3 for T0's
held-out tasks (see NOTICE). A template is written in Jinja and renders to input
and target, separated by `|||`; `answer_choices` renders to the choices,
separated in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

from jinja2 import StrictUndefined, UndefinedError, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from phatgoose.errors import DataError
from phatgoose.evaluation.suites.rows import SEED, TaskRow

FOLDER = Path(__file__).parent / "promptsource"
_PIPES = "|||"
# replaces pipes within a field; a private-use character, which no text contains
_ESCAPED = "\ue000\ue000\ue000"


class PromptTemplate:
    """One prompt template.

    Args:
        name: its name in promptsource.
        jinja: template of input and target.
        answer_choices: template of the choices.
    """

    def __init__(self, name: str, jinja: str, answer_choices: str) -> None:
        self.name = name
        environment = SandboxedEnvironment(undefined=StrictUndefined)
        environment.filters["choice"] = self._choice
        self._prompt = environment.from_string(jinja)
        self._choices = environment.from_string(answer_choices)

    def render(self, fields: Mapping[str, Any], example_id: str) -> TaskRow | None:
        """Render an example; None if the template does not apply to it (COPA's ask for a cause or for an effect).

        Raises:
            DataError: a field that the template uses is missing.
        """
        escaped = {name: _escape(value) for name, value in fields.items()} | {"example_id": example_id}
        try:
            choices = _parts(self._choices.render(escaped))
            parts = _parts(self._prompt.render(escaped, answer_choices=_escape(choices)))
        except UndefinedError as error:
            raise DataError(
                f"template {self.name!r} cannot render {example_id}",
                found=f"{error}; fields {', '.join(sorted(fields))}",
                expected="the fields of the task's dataset on the hub",
            ) from error
        if len(parts) != 2 or not all(parts):
            return None
        return TaskRow(example_id=example_id, input=parts[0], targets=(parts[1],), choices=tuple(choices))

    @pass_context
    def _choice(self, context: Context, values: Sequence[str]) -> str:
        """A random choice that is the same for an example every time; promptsource's differs between calls."""
        return Random(f"{SEED}:{context['example_id']}:{self.name}").choice(values)


def read_templates(file: str) -> list[PromptTemplate]:
    """The original-task templates of a task, sorted by name."""
    import yaml

    content = yaml.safe_load((FOLDER / file).read_text(encoding="utf-8"))
    templates = [
        PromptTemplate(template["name"], template["jinja"], template["answer_choices"])
        for template in content["templates"]
        if template["original_task"]
    ]
    return sorted(templates, key=lambda template: template.name)


def render(templates: Sequence[PromptTemplate], fields: Mapping[str, Any], example_id: str) -> Iterator[TaskRow]:
    """Render an example with every template that applies to it."""
    for template in templates:
        row = template.render(fields, example_id)
        if row is not None:
            yield row


def _escape(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace(_PIPES, _ESCAPED)
    return [_escape(part) for part in value] if isinstance(value, list) else value


def _parts(text: str) -> list[str]:
    return [part.replace(_ESCAPED, _PIPES).strip() for part in text.split(_PIPES)]
