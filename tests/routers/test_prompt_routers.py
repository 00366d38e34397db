"""Routers that read prompts."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F

from helpers.checks import assert_close, fails
from helpers.data import token_ids
from helpers.models import MODELS, llama, t5
from helpers.pools import make_expert
from helpers.routing import complete, logits, make_pool, routed
from phatgoose.errors import ConfigError, RouterError
from phatgoose.experts.embeddings import ENCODER, SentenceEncoder, save_embeddings
from phatgoose.experts.pool import Pool
from phatgoose.experts.provenance import EmbeddingsProvenance
from phatgoose.routing.state import IDLE

SITE = "model.layers.1.mlp.down_proj"


def prompt_pool(folder: Path) -> Pool:
    """Two experts whose examples are embedded for real."""
    pool = Pool.create(folder / "pool", "tiny-llama")
    for i, texts in enumerate((["<10> <11> <12>", "<10> <12>"], ["<50> <51> <52>", "<51> <53>"])):
        expert = complete(make_expert(llama, folder / f"e{i}", seed=i), seed=i)
        embeddings_MD = SentenceEncoder().embed(texts)
        provenance = EmbeddingsProvenance(encoder=ENCODER, data="", num_examples=2, seed=0, phatgoose="test")
        save_embeddings(expert, embeddings_MD, provenance)
        pool.add(expert)
    return pool


IDS = torch.tensor([[10, 11, 12, 13], [50, 51, 52, 54], [10, 12, 14, 11]])
OWNERS = ["e0", "e1", "e0"]


def test_retrieval_gives_each_prompt_to_the_nearest_examples_owner(tmp_path: Path) -> None:
    pool = prompt_pool(tmp_path)
    model = routed(llama(), pool, router="retrieval")
    with model.trace() as trace:
        found = logits(model, input_ids=IDS)
    for row, owner in enumerate(OWNERS):
        expected = logits(PeftModel.from_pretrained(llama(), tmp_path / owner), input_ids=IDS[row : row + 1])
        assert_close(found[row : row + 1], expected)
        assert all(trace.weights(site)[row, :, int(owner[1])].min() == 1 for site in trace.sites)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("router", ["retrieval", "glider", "phatgoose-prior", "phatgoose-retrieval"])
def test_generation_keeps_the_prompts_bias(router: str, beams: int, tmp_path: Path) -> None:
    """Each prompt alone, and all of them in a left-padded batch, with beams too."""
    model = routed(llama(), prompt_pool(tmp_path), router=router)
    padded = torch.cat([torch.zeros(3, 2, dtype=torch.long), IDS], dim=1)
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams}
    batch = model.generate(padded, attention_mask=(padded > 0).long(), **options)
    for row, found in zip(IDS, batch[:, 2:], strict=True):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones(1, 4).long(), **options)[0]
        length = min(len(found), len(alone))
        assert torch.equal(found[:length], alone[:length])
    assert model.state.current() is IDLE


def test_glider_adds_scaled_similarity(tmp_path: Path) -> None:
    pool = prompt_pool(tmp_path)
    model = routed(llama(), pool, router="glider", global_scale=7.0)
    encoder = SentenceEncoder()
    means = torch.stack(
        [load_file(expert.folder / "embeddings.safetensors")["embeddings"].mean(0) for expert in pool.experts()]
    )
    cosine_BE = F.cosine_similarity(
        encoder.embed(["<10> <11> <12> <13>", "<50> <51> <52> <54>"])[:, None], means[None], dim=2
    )
    plain = routed(llama(), pool, router="phatgoose").routed_linears()[SITE].router
    x_BSI = torch.randn(2, 5, 44)
    with model.prompts(IDS[:2].tolist()):
        linear = model.routed_linears()[SITE]
        routing = linear.router(x_BSI.flatten(0, 1), model.state.current().bias_BE(SITE).repeat_interleave(5, 0))
    scores_BSE = plain.scores(x_BSI.flatten(0, 1)).view(2, 5, 2) + 7 * cosine_BE[:, None]
    expected = scores_BSE.softmax(-1).flatten(0, 1)
    found = torch.zeros(10, 2).scatter(1, routing.expert_ids_NK, routing.weights_NK)
    assert_close(found, expected)


def test_retrieval_prior_is_the_log_density_of_the_examples(tmp_path: Path) -> None:
    """Written out example by example; experts with unlike numbers of examples are not favoured."""
    pool = prompt_pool(tmp_path)
    expert = complete(make_expert(llama, tmp_path / "e2", seed=2), seed=2)
    once = SentenceEncoder().embed(["<10> <11> <12>", "<10> <12>"])
    provenance = EmbeddingsProvenance(encoder=ENCODER, data="", num_examples=8, seed=0, phatgoose="test")
    save_embeddings(expert, once.repeat(4, 1), provenance)  # e0's examples, each four times
    pool.add(expert)
    model = routed(llama(), pool, router="phatgoose-retrieval", retrieval_scale=5.0)
    prompts_BD = SentenceEncoder().embed(["<10> <11> <12> <13>", "<50> <51> <52> <54>"])
    with model.prompts(IDS[:2].tolist()):
        bias_BE = model.state.current().bias_BE(SITE)
    for b, prompt_D in enumerate(prompts_BD):
        for e, expert in enumerate(pool.experts()):
            examples_MD = load_file(expert.folder / "embeddings.safetensors")["embeddings"]
            density = sum(math.exp(5 * float(prompt_D @ example_D)) for example_D in examples_MD) / len(examples_MD)
            assert float(bias_BE[b, e]) == pytest.approx(math.log(density), abs=1e-4)
    assert_close(bias_BE[:, 0], bias_BE[:, 2])
    assert bias_BE[0, 0] > bias_BE[0, 1] and bias_BE[1, 0] < bias_BE[1, 1]


@pytest.mark.parametrize("kind", MODELS)
def test_prior_is_the_log_share_of_a_first_pass(kind: str, tmp_path: Path) -> None:
    """Shares from the trace of each prompt alone, routed by plain phatgoose (T5: of its encoder alone)."""
    pool = make_pool(kind, tmp_path)
    model = routed(MODELS[kind](), pool, router="phatgoose-prior", prior_strength=1.5)
    prompts = [token_ids(4, seed=1).tolist(), token_ids(7, seed=2).tolist()]
    expected = []
    for ids in prompts:
        plain = routed(MODELS[kind](), pool, router="phatgoose")
        reader = plain.get_encoder() if kind == "t5" else plain
        with plain.trace() as trace, torch.no_grad():
            reader(input_ids=torch.tensor([ids]))
        share_E = torch.stack([trace.weights(site)[0] for site in trace.sites]).mean(dim=(0, 1))
        expected.append(1.5 * torch.log(share_E + 1e-3))
    with model.prompts(prompts):
        for site in model.routed_linears():
            assert_close(model.state.current().bias_BE(site), torch.stack(expected))


def test_a_second_step_routes_with_the_prior_of_the_first(tmp_path: Path) -> None:
    pool, prompts = make_pool("llama", tmp_path), [token_ids(7, seed=2).tolist()]
    one = routed(llama(), pool, router="phatgoose-prior")
    with one.prompts(prompts), one.trace() as trace:
        logits(one, input_ids=torch.tensor(prompts))
    share_E = torch.stack([trace.weights(site)[0] for site in trace.sites]).mean(dim=(0, 1))
    two = routed(llama(), pool, router="phatgoose-prior", prior_steps=2)
    with two.prompts(prompts):
        assert_close(two.state.current().bias_BE(SITE), 2 * torch.log(share_E + 1e-3).unsqueeze(0))
    fails(ConfigError, "prior_steps", action=lambda: routed(llama(), pool, router="phatgoose-prior", prior_steps=0))


def test_prior_is_added_to_the_gates_scores(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    model = routed(llama(), pool, router="phatgoose-prior")
    plain = routed(llama(), pool, router="phatgoose").routed_linears()[SITE].router
    x_BSI = torch.randn(2, 5, 44)
    with model.prompts(IDS[:2].tolist()), model.trace() as trace:
        linear = model.routed_linears()[SITE]
        bias_BE = model.state.current().bias_BE(SITE)
        linear(x_BSI)
    scores_BSE = plain.scores(x_BSI.flatten(0, 1)).view(2, 5, 4) + bias_BE[:, None]
    top_BSK, ids_BSK = scores_BSE.topk(2)
    assert torch.equal(trace.routing(SITE).expert_ids_BSK, ids_BSK)
    assert_close(trace.routing(SITE).weights_BSK, top_BSK.softmax(-1))
    assert bias_BE.std() > 0.01


def test_no_prior_is_phatgoose(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    expected = logits(routed(llama(), pool, router="phatgoose"))
    model = routed(llama(), pool, router="phatgoose-prior", prior_strength=0)
    assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(routed(llama(), pool, router="phatgoose-prior")), expected)


def test_the_first_pass_is_not_traced(tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path), router="phatgoose-prior")
    with model.trace() as trace:
        logits(model, input_ids=IDS)
    assert {tuple(trace.routing(site).expert_ids_BSK.shape) for site in trace.sites} == {(3, 4, 2)}
    assert model.state.current() is IDLE


def test_prompts_that_were_not_said_are_an_error(tmp_path: Path) -> None:
    model = routed(llama(), prompt_pool(tmp_path), router="retrieval")
    fails(RouterError, "whole prompts", action=lambda: model.model(input_ids=IDS))
    with model.prompts(IDS[:2].tolist()):
        fails(RouterError, "2 prompts", action=lambda: model(input_ids=token_ids(3, 5)))


def test_prompts_can_be_said_for_answers(tmp_path: Path) -> None:
    """A prompt and its answer in one call: the prompt alone decides."""
    model = routed(llama(), prompt_pool(tmp_path), router="retrieval")
    answer = torch.tensor([[50, 51, 52, 53]])
    with model.prompts([IDS[0].tolist()]):
        found = logits(model, input_ids=torch.cat([IDS[:1], answer], dim=1))
    peft = PeftModel.from_pretrained(llama(), tmp_path / "e0")
    assert_close(found, logits(peft, input_ids=torch.cat([IDS[:1], answer], dim=1)))


def test_a_masked_owner_passes_its_prompts_on(tmp_path: Path) -> None:
    model = routed(llama(), prompt_pool(tmp_path), router="retrieval")
    with model.without(["e0"]):
        found = logits(model, input_ids=IDS)
    assert_close(found, logits(PeftModel.from_pretrained(llama(), tmp_path / "e1"), input_ids=IDS))


def test_retrieval_in_an_encoder_decoder(tmp_path: Path) -> None:
    pool = make_pool("t5", tmp_path)
    model = routed(t5(), pool, router="retrieval")
    with model.trace() as trace:
        logits(model)
    chosen = {tuple(trace.routing(site).expert_ids_BSK[:, 0, 0].tolist()) for site in trace.sites}
    assert len(chosen) == 1  # one owner per prompt, the same at all sites


def test_a_sequence_has_the_mean_of_its_prompts_scores(tmp_path: Path) -> None:
    """At each site, of prompts of unlike length in one batch; answer tokens too."""
    pool = make_pool("llama", tmp_path)
    plain = routed(llama(), pool)
    prompts = [IDS[0].tolist(), IDS[1, :2].tolist()]
    expected: list[dict[str, torch.Tensor]] = []
    for prompt in prompts:
        scores: dict[str, torch.Tensor] = {}
        hooks = [
            linear.register_forward_pre_hook(
                lambda module, args, site=site, into=scores: into.update(
                    {site: module.router.scores(args[0][0]).mean(0)}
                )
            )
            for site, linear in plain.routed_linears().items()
        ]
        logits(plain, input_ids=torch.tensor([prompt]))
        for hook in hooks:
            hook.remove()
        expected.append(scores)
    model = routed(plain.unwrap(), pool, router="phatgoose-sequence")
    with model.prompts(prompts), model.trace() as trace:
        found = logits(model, input_ids=IDS[:2])
    for site in trace.sites:
        weights_BSE = trace.weights(site)
        for b, scores in enumerate(expected):
            top = torch.topk(scores[site], 2)
            want_E = torch.zeros(4).scatter(0, top.indices, torch.softmax(top.values, 0))
            torch.testing.assert_close(weights_BSE[b], want_E.expand(4, -1), rtol=1e-4, atol=1e-6)
    with model.prompts(prompts[:1]):
        assert_close(logits(model, input_ids=IDS[:1]), found[:1])


def test_a_sequence_router_is_for_decoder_only_models(tmp_path: Path) -> None:
    model = routed(t5(), make_pool("t5", tmp_path), router="phatgoose-sequence")
    fails(RouterError, "decoder-only", "--router phatgoose", action=lambda: logits(model))
