"""The page in a real browser.

Axes: S positions, E experts.
"""

from __future__ import annotations

import re

import pytest
import torch

from helpers.checks import contrast
from phatgoose.analysis.prompt_page import Sample, write_page
from phatgoose.analysis.prompt_table import to_json
from phatgoose.kernels.types import Routing
from phatgoose.routing.trace import Trace

HOSTILE = "</script><b>not bold</b><img src=x onerror=\"document.title='owned'\">"
TOKENS = ["What", " is", " </script>", "<b>", "\n", "\t", " ", "\u202e", "", "Paris", " is", " big", "<eos>"]
NUM_PROMPT = 9
EXPERTS = ["plain", "<i>italic</i>", *(f"expert {i}" for i in range(2, 8))]
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_routing(tokens, num_prompt, experts=EXPERTS, layers=4, kinds=KINDS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    trace = Trace(experts, [f"model.layers.{i}.x.{kind}" for i in range(layers) for kind in kinds])
    length = len(tokens) - 1  # the last token is never read
    liking_SE = torch.randn(length, len(experts), generator=generator)
    for record in trace.records.values():
        scores = liking_SE + torch.randn(length, len(experts), generator=generator)
        top, ids = scores.topk(2)
        record.append(Routing(top.softmax(-1), ids), torch.Size((1, length)))
    return to_json(trace, tokens, num_prompt)


def write(path, samples):
    write_page(path, samples, pool_name="<u>Pool</u>", base="tiny & base", router="phatgoose", top_k=2)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    samples = [
        Sample(
            prompt=HOSTILE, base_answer="London", pool_answer="Paris is big", routing=make_routing(TOKENS, NUM_PROMPT)
        ),
        Sample(prompt="two", base_answer=None, pool_answer="", routing=make_routing(list("abc"), 2, seed=1)),
    ]
    write(path, samples)
    return path


@pytest.fixture
def page(browser, html):
    """The open page; afterwards: it logged no error and asked for nothing but itself."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    troubles, requests = [], []
    page.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(html.as_uri())
    yield page
    page.wait_for_timeout(50)
    page.close()
    assert troubles == []
    assert requests == [html.as_uri()]


def shown(page):
    return page.locator(".sample:not([hidden])")


def test_text_is_literal(page):
    assert page.locator(".said").first.text_content() == HOSTILE
    assert shown(page).locator(".said").all_text_contents()[1:] == ["London", "Paris is big"]
    assert page.locator("h1").text_content() == "<u>Pool</u>"
    assert page.title() == "<u>Pool</u>: who carried each token"
    assert page.locator(".said *, .name *, .token :not(.sign), .sample img, h1 *").count() == 0
    texts = [text.replace("\u00a0", " ") for text in shown(page).locator(".token").all_text_contents()]
    assert texts == [
        "What",
        " is",
        " </script>",
        "<b>",
        "⏎",
        "⇥",
        "␣",
        r"\u{202e}",
        "∅",
        "Paris",
        " is",
        " big",
        "<eos>",
    ]
    assert "<i>italic</i>" in shown(page).locator(".legend").text_content()


def test_choosing_a_token_shows_its_experts(page, html):
    routing = make_routing(TOKENS, NUM_PROMPT)
    detail = shown(page).locator(".detail")
    for i in (1, 10):
        before = detail.inner_text()
        shown(page).locator(".token").nth(i).click()
        assert detail.inner_text() != before
        assert f"token {i + 1} of {len(TOKENS)}" in detail.inner_text()
        leading = routing["leading"][i]
        assert detail.locator(".bars .name").first.text_content() == leading["expert"]
        percent = float(detail.locator(".bars .num").first.text_content().removesuffix(" %"))
        assert percent == pytest.approx(100 * leading["share"], abs=0.5)
        assert detail.locator(".heat tbody tr").count() == len(EXPERTS)
        assert detail.locator(".heat tbody tr").first.locator("td").count() == 4
    shown(page).locator(".token").nth(0).hover()
    assert "token 1 of" in detail.inner_text()
    page.mouse.move(2, 2)
    assert "token 11 of" in detail.inner_text()
    shown(page).locator(".token").last.click()
    assert "never routed" in detail.inner_text()


def test_keyboard(page):
    tokens, detail = shown(page).locator(".token"), shown(page).locator(".detail")
    assert shown(page).locator(".token[tabindex='0']").count() == 1  # one stop for the tabulator key
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    assert tokens.nth(1).get_attribute("aria-selected") == "true"
    assert "token 2 of" in detail.inner_text()
    page.keyboard.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.i") != "1"
    page.keyboard.press("End")
    page.keyboard.press("Home")
    assert "token 1 of" in detail.inner_text()
    detail.locator(".heat tbody td").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    assert detail.locator("output").text_content().startswith("Layer 1 · <i>italic</i> · ")


def test_kind_of_site_changes_the_map(page):
    overall = shown(page).locator(".overall")
    before = overall.locator(".heat").text_content()
    overall.get_by_label("v_proj").check(force=True)
    after = overall.locator(".heat").text_content()
    assert after != before
    expected = make_routing(TOKENS, NUM_PROMPT)["layer_weights"]["text"]["v_proj"][0][0]
    first = overall.locator(".heat tbody td").first.text_content()
    assert float(first.removesuffix(" %")) == pytest.approx(100 * expected, abs=0.5)
    overall.get_by_label("all sites").check(force=True)
    assert overall.locator(".heat").text_content() == before


def test_one_expert_alone(page):
    token = shown(page).locator(".token").first
    before = token.get_attribute("style")
    button = shown(page).locator(".legend button").last
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    colours = {
        re.search(r"--c: ([^;]*)", t.get_attribute("style"))[1] for t in shown(page).locator(".token").all()[:-1]
    }
    assert len(colours) == 1
    button.click()
    assert token.get_attribute("style") == before


def test_strip_and_samples(page):
    shown(page).locator("canvas").click(position={"x": 3, "y": 3})
    assert "token 1 of" in shown(page).locator(".detail").inner_text()
    assert "layer 0" in shown(page).locator(".strip + .under output").text_content()
    page.locator(".picker button").nth(1).click()
    assert shown(page).locator(".said").first.text_content() == "two"
    assert shown(page).locator(".base").count() == 0
    assert shown(page).locator(".token").count() == 3


# The colour that a reader sees, whatever notation the browser reports it in: painted on a canvas over the card.
SEEN = """
tokens => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const pixel = (...colours) => {
    for (const colour of colours) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1); }
    return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  return tokens.map(token => {
    const card = getComputedStyle(token.closest(".card")).backgroundColor, style = getComputedStyle(token);
    return [pixel(style.color), pixel(card, style.backgroundColor), pixel(card)];
  });
}
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_token_text_has_contrast(browser, tmp_path, scheme):
    # every colour of the palette, and generated ones, at full strength
    experts = [f"e{i}" for i in range(20)]
    trace = Trace(experts, ["layers.0.q_proj"])
    ids = torch.tensor([[i, (i + 1) % 20] for i in range(20)])
    trace.records["layers.0.q_proj"].append(Routing(torch.tensor([[1.0, 0.0]] * 20), ids), torch.Size((1, 20)))
    routing = to_json(trace, [f" t{i}" for i in range(20)], 10)
    write(tmp_path / "page.html", [Sample(prompt="p", base_answer="b", pool_answer="a", routing=routing)])
    page = browser.new_page()
    page.emulate_media(color_scheme=scheme)
    page.goto((tmp_path / "page.html").as_uri())
    seen = page.locator(".token").evaluate_all(SEEN)
    page.close()
    assert len(seen) == 20
    assert len({tuple(background) for _, background, _ in seen}) == 20
    for ink, background, card in seen:
        assert contrast(ink, background) >= 4.5
        assert background != card
    dark_text = sum(seen[0][0]) < sum(seen[0][2])
    assert dark_text == (scheme == "light")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(browser, html, width):
    page = browser.new_page(viewport={"width": width, "height": 800})
    page.goto(html.as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_an_input_that_no_site_reads(browser, tmp_path):
    trace = Trace(EXPERTS, ["decoder.block.0.layer.0.SelfAttention.q"])
    for record in trace.records.values():
        record.append(Routing(torch.ones(3, 1), torch.tensor([[1], [0], [1]])), torch.Size((1, 3)))
    routing = to_json(trace, list("abcdxyz."), 4, encoder_decoder=True)
    write(tmp_path / "page.html", [Sample(prompt="p", base_answer=None, pool_answer="a", routing=routing)])
    page = browser.new_page()
    troubles = []
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.goto((tmp_path / "page.html").as_uri())
    detail = page.locator(".detail")
    assert "token 5 of 8" in detail.inner_text()
    for i, words in ((1, "No expert adapts a layer that reads the input"), (5, "plain"), (7, "wrote this token")):
        page.locator(".token").nth(i).click()
        assert words in detail.inner_text()
    page.locator("canvas").click(position={"x": 3, "y": 3})
    assert "token 1 of 8" in detail.inner_text()
    assert page.locator(".overall .heat tbody tr").count() == len(EXPERTS)
    page.close()
    assert troubles == []


def test_size(tmp_path):
    routing = make_routing([" word"] * 60, 30, layers=30)
    write(tmp_path / "page.html", [Sample(prompt="p", base_answer="b", pool_answer="a", routing=routing)] * 4)
    assert (tmp_path / "page.html").stat().st_size < 1_500_000


def test_refusals_leave_the_old_page(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    with pytest.raises(ValueError, match="at least one sample"):
        write(path, [])
    one, other = (make_routing(list("ab"), 1, experts=experts) for experts in (EXPERTS, ["x", "y"]))
    with pytest.raises(ValueError, match="one pool"):
        write(path, [Sample(prompt="", base_answer=None, pool_answer="", routing=r) for r in (one, other)])
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["page.html"]
