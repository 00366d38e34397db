"""The environment that all pages share."""

from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import DictLoader, UndefinedError

from phatgoose.report import html


@pytest.fixture
def templates(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Templates of this test, in the shared environment."""
    sources: dict[str, str] = {}
    monkeypatch.setattr(html, "PackageLoader", lambda *_: DictLoader(sources))
    return sources


def test_values_are_text(templates: dict[str, str], tmp_path: Path) -> None:
    templates["page"] = "<p>{{ name }}</p>\n<script>{{ data|tojson }}</script>"
    html.write_html(tmp_path / "page.html", "page", name="<b>&", data={"a": "</script>", "b": [1, 2]})
    text = (tmp_path / "page.html").read_text()
    assert text == '<p>&lt;b&gt;&amp;</p>\n<script>{"a":"\\u003c/script\\u003e","b":[1,2]}</script>'


def test_a_missing_value_leaves_the_older_page(templates: dict[str, str], tmp_path: Path) -> None:
    templates["page"] = "{{ name }}"
    html.write_html(tmp_path / "page.html", "page", name="old")
    with pytest.raises(UndefinedError):
        html.write_html(tmp_path / "page.html", "page")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text() == "old"


def test_folders_are_made_and_blocks_leave_no_lines(templates: dict[str, str], tmp_path: Path) -> None:
    templates["page"] = "a\n  {% if shown %}\nb\n  {% endif %}\nc"
    html.write_html(tmp_path / "new" / "folder" / "page.html", "page", shown=True)
    assert (tmp_path / "new" / "folder" / "page.html").read_text() == "a\nb\nc"


@pytest.mark.parametrize(
    "template", ["results/comparison.html.jinja", "analysis/analysis.html.jinja", "analysis/prompt_page.html.jinja"]
)
def test_the_packages_templates_are_found(template: str) -> None:
    assert html._environment().get_template(template).name == template
