"""Self-contained HTML pages: the Jinja environment that all of them share.

A page loads nothing, so it can be mailed, archived or opened from a disk. Its
template lies beside the module that fills it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from phatgoose.files import replacing


def write_html(path: str | Path, template: str, **values: Any) -> None:
    """Render a template to a file, and create the folders above it; an older file is replaced atomically.

    Args:
        path: the .html file.
        template: path below the package, such as "results/comparison.html.jinja".
        values: variables of the template.
    """
    html = _environment().get_template(template).render(values)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("phatgoose", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # `tojson` escapes <, >, & and ' as \u003c and so on: no text can close a script element
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment
