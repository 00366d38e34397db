"""The tables of a trace against sums written out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers.data import as_text
from helpers.models import make_tokenizer, t5
from helpers.pools import make_pool
from phatgoose.analysis.prompt_page import routed_sample
from phatgoose.analysis.prompt_table import layer_weights, to_json, token_shares
from phatgoose.cli.prompts import token_table
from phatgoose.config import GenerationConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.experts.site_names import describe_site
from phatgoose.kernels.types import Routing
from phatgoose.routing.model import RoutedModel
from phatgoose.routing.trace import Trace

EXPERTS = ("anna", "bert", "carl")
DECODER_ONLY = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.0.mlp.up_proj",
    "model.layers.10.self_attn.q_proj",
    "lm_head",
]
T5 = {
    "encoder.block.0.layer.0.SelfAttention.q": ("input", "encoder 0", "q"),
    "encoder.block.1.layer.1.DenseReluDense.wo": ("input", "encoder 1", "wo"),
    "decoder.block.0.layer.0.SelfAttention.k": ("output", "decoder 0", "k"),
    "decoder.block.0.layer.1.EncDecAttention.q": ("output", "decoder 0", "q"),
    "decoder.block.0.layer.1.EncDecAttention.k": ("input", "decoder 0", "k"),
    "decoder.block.0.layer.1.EncDecAttention.v": ("input", "decoder 0", "v"),
    "decoder.block.1.layer.2.DenseReluDense.wo": ("output", "decoder 1", "wo"),
}
BART = {
    "model.encoder.layers.0.self_attn.k_proj": ("input", "encoder 0", "k_proj"),
    "model.decoder.layers.3.self_attn.k_proj": ("output", "decoder 3", "k_proj"),
    "model.decoder.layers.3.encoder_attn.k_proj": ("input", "decoder 3", "k_proj"),
    "model.decoder.layers.3.encoder_attn.v_proj": ("input", "decoder 3", "v_proj"),
    "model.decoder.layers.3.encoder_attn.q_proj": ("output", "decoder 3", "q_proj"),
}


def make_trace(positions: dict[str, int], seed: int = 0, batch: int = 1) -> Trace:
    """A trace with random routing, two experts a token; one call over all positions but one, then one more."""
    generator = torch.Generator().manual_seed(seed)
    trace = Trace(EXPERTS, list(positions))
    for site, count in positions.items():
        for length in (count - 1, 1):
            scores = torch.randn(batch * length, len(EXPERTS), generator=generator)
            top, ids = scores.topk(2)
            trace.records[site].append(Routing(top.softmax(-1), ids), torch.Size((batch, length)))
    return trace


def mean_weight(trace: Trace, sites: list[str], position: int, expert: int, sequence: int = 0) -> float:
    """The definition, number by number."""
    total = 0.0
    for site in sites:
        weights, ids = trace.routing(site)
        for weight, found in zip(weights[sequence, position], ids[sequence, position], strict=True):
            total += float(weight) * (int(found) == expert)
    return total / len(sites)


@pytest.mark.parametrize(("name", "expected"), [*T5.items(), *BART.items()])
def test_streams_and_layers_of_encoder_decoders(name, expected):
    site = describe_site(name, encoder_decoder=True)
    assert (site.stream, site.layer, site.kind) == expected


def test_decoder_only_sites_have_one_stream():
    sites = [describe_site(name) for name in DECODER_ONLY]
    assert [site.stream for site in sites] == ["text"] * 4
    assert [site.layer for site in sites] == ["0", "0", "10", "lm_head"]
    assert [site.kind for site in sites] == ["q_proj", "up_proj", "q_proj", "lm_head"]


@pytest.mark.parametrize("sequence", [0, 1])
def test_token_shares(sequence):
    trace = make_trace(dict.fromkeys(DECODER_ONLY, 5), batch=2)
    shares = token_shares(trace, 3, sequence=sequence)
    expected = [[mean_weight(trace, DECODER_ONLY, s, e, sequence) for e in range(3)] for s in range(5)]
    assert shares.shares_SE.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]
    assert shares.leading_S.tolist() == [row.index(max(row)) for row in expected]
    assert shares.leading_share_S.tolist() == pytest.approx([max(row) for row in expected], abs=1e-6)
    for part, rows in ((shares.text_E, expected), (shares.prompt_E, expected[:3]), (shares.answer_E, expected[3:])):
        assert part.tolist() == pytest.approx([sum(column) / len(rows) for column in zip(*rows, strict=True)], abs=1e-6)
    assert shares.shares_SE.sum(dim=1).tolist() == pytest.approx([1.0] * 5)


def test_layer_weights():
    trace = make_trace(dict.fromkeys(DECODER_ONLY, 4))
    table = layer_weights(trace)
    assert table.layers == ("0", "10", "lm_head")
    assert table.kinds == ("q_proj", "up_proj", "lm_head")
    in_layer = [DECODER_ONLY[:2], DECODER_ONLY[2:3], DECODER_ONLY[3:]]
    for position in range(4):
        for layer, sites in enumerate(in_layer):
            expected = [mean_weight(trace, sites, position, expert) for expert in range(3)]
            assert table.tokens_SLE[position, layer].tolist() == pytest.approx(expected, abs=1e-6)
    means = table.means["text"]
    assert list(means) == ["all", "q_proj", "up_proj", "lm_head"]
    expected = [sum(mean_weight(trace, DECODER_ONLY[2:3], s, e) for s in range(4)) / 4 for e in range(3)]
    assert means["q_proj"][1].tolist() == pytest.approx(expected, abs=1e-6)
    expected = [sum(mean_weight(trace, DECODER_ONLY[:2], s, e) for s in range(4)) / 4 for e in range(3)]
    assert means["all"][0].tolist() == pytest.approx(expected, abs=1e-6)
    assert means["up_proj"][1].isnan().all()


def t5_trace() -> Trace:
    return make_trace({site: 4 if stream == "input" else 3 for site, (stream, _, _) in T5.items()})


def test_encoder_decoder_joins_input_and_output():
    trace = t5_trace()
    shares = token_shares(trace, encoder_decoder=True)
    assert shares.num_prompt == 4
    assert shares.streams == ("input",) * 4 + ("output",) * 3
    of = {name: [site for site, (stream, _, _) in T5.items() if stream == name] for name in ("input", "output")}
    expected = [[mean_weight(trace, of["input"], s, e) for e in range(3)] for s in range(4)]
    expected += [[mean_weight(trace, of["output"], s, e) for e in range(3)] for s in range(3)]
    assert shares.shares_SE.tolist() == [pytest.approx(row, abs=1e-6) for row in expected]

    table = layer_weights(trace, encoder_decoder=True)
    assert table.layers == ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
    cross = ["decoder.block.0.layer.1.EncDecAttention.k", "decoder.block.0.layer.1.EncDecAttention.v"]
    decoder_0 = ["decoder.block.0.layer.0.SelfAttention.k", "decoder.block.0.layer.1.EncDecAttention.q"]
    assert table.tokens_SLE[1, 2].tolist() == pytest.approx([mean_weight(trace, cross, 1, e) for e in range(3)])
    assert table.tokens_SLE[4 + 1, 2].tolist() == pytest.approx([mean_weight(trace, decoder_0, 1, e) for e in range(3)])
    assert table.tokens_SLE[5, 0].isnan().all()  # the output never passes the encoder
    assert list(table.means) == ["input", "output"]
    own_keys = [sum(mean_weight(trace, decoder_0[:1], s, e) for s in range(3)) / 3 for e in range(3)]
    assert table.means["output"]["k"][2].tolist() == pytest.approx(own_keys, abs=1e-6)
    assert "v" not in table.means["output"]


def test_shares_in_whole_numbers():
    sites = DECODER_ONLY[:2]
    trace = Trace(["a", "b"], sites)
    for site, ids in zip(sites, ([[0], [1]], [[0], [0]]), strict=True):
        trace.records[site].append(Routing(torch.ones(2, 1), torch.tensor(ids)), torch.Size([1, 2]))
    found = to_json(trace, ["x", "y", "z"], 1)
    assert found["token_shares"] == [[1.0, 0.0], [0.5, 0.5], None]
    assert found["shares"]["prompt"] == {"a": 1.0, "b": 0.0}
    assert found["shares"]["answer"] == {"a": 0.5, "b": 0.5}
    assert found["leading"] == [{"expert": "a", "share": 1.0}, {"expert": "a", "share": 0.5}, None]
    assert found["layer_weights"]["text"]["up_proj"] == [[1.0, 0.0]]


def test_json_round_trip():
    tokens = ["a", " b", "\n", "c", "d", "</s>"]
    trace = make_trace(dict.fromkeys(DECODER_ONLY, 5))
    table = to_json(trace, tokens, 3)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert list(table) == [
        "experts",
        "tokens",
        "num_prompt",
        "streams",
        "sites",
        "layers",
        "kinds",
        "leading",
        "shares",
        "token_shares",
        "weights",
        "layer_weights",
    ]
    assert table["experts"] == list(EXPERTS)
    assert table["tokens"] == tokens
    assert table["sites"] == DECODER_ONLY
    assert table["streams"] == ["text"] * 6
    shares = token_shares(trace, 3)
    for position in range(5):
        leading = int(shares.leading_S[position])
        assert table["leading"][position] == {
            "expert": EXPERTS[leading],
            "share": round(float(shares.leading_share_S[position]), 3),
        }
        assert table["weights"][position][1] == [
            round(mean_weight(trace, DECODER_ONLY[2:3], position, e), 3) for e in range(3)
        ]
    # the model never read its last token
    assert table["leading"][5] is table["token_shares"][5] is table["weights"][5] is None
    assert set(table["shares"]["answer"]) == set(EXPERTS)
    assert math.isclose(sum(table["shares"]["text"].values()), 1, abs_tol=2e-3)
    assert table["layer_weights"]["text"]["up_proj"][1:] == [None, None]


def test_json_of_an_encoder_decoder():
    table = to_json(t5_trace(), list("abcdxyz."), encoder_decoder=True)
    assert table["num_prompt"] == 4
    assert table["streams"] == ["input"] * 4 + ["output"] * 4
    assert table["weights"][6][:2] == [None, None]
    assert table["weights"][0][3] is None


OUTPUT_SITES = {site: 3 for site, (stream, _, _) in T5.items() if stream == "output"}
INPUT_SITES = {site: 4 for site, (stream, _, _) in T5.items() if stream == "input"}


def test_an_input_that_no_site_reads():
    trace = make_trace(OUTPUT_SITES)
    table = to_json(trace, list("abcdxyz."), 4, encoder_decoder=True)
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert table["streams"] == ["input"] * 4 + ["output"] * 4
    for key in ("leading", "token_shares", "weights"):
        assert [entry is None for entry in table[key]] == [True] * 4 + [False] * 3 + [True]
    expected = [[mean_weight(trace, list(OUTPUT_SITES), s, e) for e in range(3)] for s in range(3)]
    assert table["token_shares"][4:7] == [pytest.approx(row, abs=6e-4) for row in expected]
    assert table["shares"]["prompt"] is None
    assert table["shares"]["text"] == table["shares"]["answer"]
    means = [sum(column) / 3 for column in zip(*expected, strict=True)]
    assert list(table["shares"]["answer"].values()) == pytest.approx(means, abs=6e-4)
    assert list(table["layer_weights"]) == ["output"]


def test_an_output_that_no_site_reads():
    table = to_json(make_trace(INPUT_SITES), list("abcdxyz."), encoder_decoder=True)
    assert table["streams"] == ["input"] * 4 + ["output"] * 4
    assert [shares is None for shares in table["token_shares"]] == [False] * 4 + [True] * 4
    assert table["shares"]["answer"] is None
    assert list(table["layer_weights"]) == ["input"]


@pytest.mark.parametrize("adapted", ["decoder", "encoder"])
def test_half_of_an_encoder_decoder_is_adapted(adapted, tmp_path):
    """From text to table: what no adapted layer reads has no shares."""
    pool = make_pool(t5, tmp_path, target_modules=rf"{adapted}\..*\.SelfAttention\.[qv]")
    model = RoutedModel.from_pool(t5(), pool)
    encoder = Encoder(make_tokenizer(), model.config, TextConfig())
    sample = routed_sample(model, encoder, as_text([5, 6, 7]), GenerationConfig(max_new_tokens=4))
    tokens, shares = sample.routing["tokens"], sample.routing["token_shares"]
    assert tokens[:4] == ["<5>", "<6>", "<7>", "<0>"]
    assert len(tokens) > 5  # at least two were written
    routed = [row is not None for row in shares]
    expected = [False] * 3 + [True] * (len(tokens) - 4) + [False]
    assert routed == (expected if adapted == "decoder" else [True] * 3 + [False] * (len(tokens) - 3))
    assert len(token_table(sample.routing).rows) == len(tokens)


def test_no_answer():
    table = to_json(make_trace(dict.fromkeys(DECODER_ONLY, 2)), ["a", "b"])
    assert table["num_prompt"] == 2
    assert table["shares"]["answer"] is None


def test_refusals():
    trace = make_trace(dict.fromkeys(DECODER_ONLY, 5))
    with pytest.raises(ValueError, match=r"num_prompt is 6, but the trace allows 0 to 5"):
        token_shares(trace, 6)
    with pytest.raises(ValueError, match="4 tokens, but 5 positions"):
        to_json(trace, list("abcd"))
    with pytest.raises(ValueError, match="no positions"):
        token_shares(Trace(EXPERTS, DECODER_ONLY))
    with pytest.raises(ValueError, match=r"\[4, 5\] positions"):
        token_shares(make_trace({DECODER_ONLY[0]: 5, DECODER_ONLY[1]: 4}))
    with pytest.raises(ValueError, match="read the input saw no positions"):
        token_shares(make_trace({"decoder.block.0.layer.0.SelfAttention.k": 3}), encoder_decoder=True)
    with pytest.raises(ValueError, match="num_prompt is 5"):
        token_shares(t5_trace(), 5, encoder_decoder=True)
