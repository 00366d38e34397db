"""The page in a real browser."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from phatgoose.page import Sample, write_page
from phatgoose.routers import Routing
from phatgoose.routing_table import to_json
from phatgoose.trace import Trace

HOSTILE = "</script><b>bold</b>"
TOKENS = ["What", "\n", HOSTILE, " is", " it", "?", "Nothing", "."]
SITES = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp.down_proj")]


def routing() -> dict[str, Any]:
    trace = Trace(["topic", "summary", "paraphrase"], SITES)
    generator = torch.Generator().manual_seed(0)
    for site in SITES:
        scores = torch.rand(7, 3, generator=generator)
        top, ids = scores.topk(2)
        trace.records[site].append(Routing(torch.softmax(4 * top, -1), ids), torch.Size([1, 7]))
    return to_json(trace, TOKENS, 6)


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    browser_path = shutil.which("chromium")
    if browser_path is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have chromium")
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    path = tmp_path / "page.html"
    sample = Sample(prompt=f"What {HOSTILE}?", base_answer="base says", pool_answer="Nothing.", routing=routing())
    write_page(path, [sample, sample], pool_name="toys", base="tiny", router="phatgoose", top_k=2)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-background-networking"]
        )
        opened = browser.new_page()
        opened.problems = []
        opened.on("console", lambda m: opened.problems.append(m.text) if m.type == "error" else None)
        opened.on("pageerror", lambda e: opened.problems.append(str(e)))
        opened.on("request", lambda r: opened.problems.append(r.url) if not r.url.startswith("file:") else None)
        opened.goto(path.as_uri())
        yield opened
        assert opened.problems == []
        browser.close()


def test_it_shows_what_was_said_and_no_markup_gets_through(page: Any) -> None:
    text = page.inner_text("body")
    for word in ("base says", "Nothing.", "topic", "summary", "paraphrase", HOSTILE):
        assert word in text
    assert page.locator("b", has_text="bold").count() == 0


def test_a_token_shows_its_experts(page: Any) -> None:
    tokens = page.locator("article:not([hidden]) button.token, article:not([hidden]) .token")
    assert tokens.count() >= 7
    before = page.inner_text("article:not([hidden])")
    tokens.nth(0).click()
    first = page.inner_text("article:not([hidden])")
    tokens.nth(4).click()
    second = page.inner_text("article:not([hidden])")
    assert len({before, first, second}) >= 2
    assert first != second


@pytest.mark.parametrize("width", [390, 1300])
def test_it_fits_the_screen(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).color !== getComputedStyle(document.body).backgroundColor")


def test_shares_are_means_over_the_sites() -> None:
    trace = Trace(["a", "b"], SITES[:2])
    for site, ids in zip(SITES[:2], ([[0], [1]], [[0], [0]]), strict=True):
        trace.records[site].append(Routing(torch.ones(2, 1), torch.tensor(ids)), torch.Size([1, 2]))
    found = to_json(trace, ["x", "y", "z"], 1)
    assert found["token_shares"] == [[1.0, 0.0], [0.5, 0.5], None]
    assert found["shares"]["prompt"] == {"a": 1.0, "b": 0.0}
    assert found["shares"]["answer"] == {"a": 0.5, "b": 0.5}
    assert found["leading"][0] == {"expert": "a", "share": 1.0}
    assert found["leading"][2] is None
    assert found["layer_weights"]["text"]["down_proj"] == [[1.0, 0.0]]
