"""Every router: what all of them promise, and each rule against a derivation of a few lines."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    MODELS,
    assert_close,
    fails,
    fill_pool,
    gpt2,
    llama,
    make_adapter,
    make_expert,
    make_tokenizer,
    model_inputs,
    t5,
    token_ids,
)
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from phatgoose.activations import ACTIVATIONS, ActivationsProvenance
from phatgoose.adapter import WEIGHTS_FILE, Adapter
from phatgoose.embeddings import EmbeddingsProvenance, save_embeddings
from phatgoose.errors import ConfigError, PoolError, RouterError
from phatgoose.expert import Expert
from phatgoose.files import sha256
from phatgoose.pool import Pool
from phatgoose.routed import RoutedModel
from phatgoose.routers import ROUTERS, router_class
from phatgoose.routers.spectrum import spectrum
from phatgoose.sentence_encoder import ENCODER, SentenceEncoder
from phatgoose.stack import SiteStack, stack_sites

# `single` routes among one expert, and has tests of its own
AMONG_MANY = [name for name in ROUTERS if name != "single"]
TOKEN_LEVEL = [name for name in AMONG_MANY if not router_class(name).reads_prompts]


def complete(folder: Path, seed: int) -> Path:
    """Give an expert's folder whatever any router needs."""
    generator = torch.Generator().manual_seed(2000 + seed)
    shapes = Adapter(folder).shapes
    vectors = {site: torch.randn(shape.in_features, generator=generator) for site, shape in shapes.items()}
    provenance = ActivationsProvenance(
        base="tiny",
        revision=None,
        data="",
        adapter_sha256=sha256(folder / WEIGHTS_FILE),
        num_examples=1,
        settings={},
        phatgoose="test",
    )
    ACTIVATIONS.save(folder, vectors, asdict(provenance), torch.float32)
    embeddings_MD = F.normalize(torch.randn(5, 384, generator=generator), dim=1)
    save_embeddings(
        folder,
        embeddings_MD,
        EmbeddingsProvenance(encoder=ENCODER, data="", num_examples=5, seed=0, phatgoose="test"),
    )
    return folder


def make_pool(kind: str, folder: Path, num_experts: int = 4, **lora: Any) -> Pool:
    factory = MODELS[kind]
    experts = [complete(make_expert(factory, folder / f"e{i}", seed=i, **lora), seed=i) for i in range(num_experts)]
    return fill_pool(folder / "pool", factory().config._name_or_path, experts)


def routed(model: Any, pool: Pool, **options: Any) -> RoutedModel:
    return RoutedModel.from_pool(model, pool, tokenizer=make_tokenizer(), **options)


@torch.no_grad()
def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or model_inputs(model))).logits


# What all routers promise


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("router", AMONG_MANY)
def test_weights_sum_to_one_and_ids_are_distinct(router: str, kind: str, tmp_path: Path) -> None:
    model = routed(MODELS[kind](), make_pool(kind, tmp_path), router=router, top_k=3)
    with model.trace() as trace:
        logits(model)
    assert len(trace.sites) == len(model.routed_linears())
    for site in trace.sites:
        weights, ids = trace.routing(site)
        assert weights.min() >= 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert all(len(set(row)) == len(row) for row in ids.flatten(0, 1).tolist())


@pytest.mark.parametrize("router", AMONG_MANY)
def test_the_order_of_experts_does_not_matter(router: str, tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    model = routed(llama(), pool, router=router)
    expected = logits(model)
    assert_close(logits(routed(model.unwrap(), pool.subset(pool.names[::-1]), router=router)), expected)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("router", AMONG_MANY)
def test_one_expert_is_peft(router: str, kind: str, tmp_path: Path) -> None:
    pool = make_pool(kind, tmp_path, num_experts=1)
    expected = logits(PeftModel.from_pretrained(MODELS[kind](), tmp_path / "e0"))
    assert_close(logits(routed(MODELS[kind](), pool, router=router, top_k=1)), expected)


@pytest.mark.parametrize("router", AMONG_MANY)
def test_all_experts_of_equal_weights_are_any_of_them(router: str, tmp_path: Path) -> None:
    """top_k = N among copies of one expert: whatever the weights, they sum to 1."""
    make_expert(llama, tmp_path / "e")
    pool = Pool.create(tmp_path / "pool", "tiny-llama")
    for i in range(3):
        pool.add(complete(tmp_path / "e", seed=i), f"copy-{i}")
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "e"))
    assert_close(logits(routed(llama(), pool, router=router, top_k=3)), expected)


@pytest.mark.parametrize("router", AMONG_MANY)
def test_bf16(router: str, tmp_path: Path) -> None:
    """Routing in fp32 on bf16 activations; the result has the base's dtype and is near the fp32 one."""
    pool = make_pool("llama", tmp_path)
    expected = logits(routed(llama(), pool, router=router))
    model = routed(llama().bfloat16(), pool, router=router)
    with model.trace() as trace:
        found = logits(model)
    assert found.dtype == torch.bfloat16
    assert all(trace.routing(site).weights_BSK.dtype == torch.float32 for site in trace.sites)
    # rounding may turn a near tie of two experts around: the median is what must be near
    relative_BS = (found.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert relative_BS.median() < 0.1


@pytest.mark.parametrize("router", TOKEN_LEVEL)
def test_strided_and_packed_tokens(router: str, tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path), router=router)
    for linear in model.routed_linears().values():
        x_SBI = torch.randn(5, 3, linear.base.in_features)
        expected = linear(x_SBI)
        assert_close(linear(x_SBI.transpose(0, 1)).transpose(0, 1), expected)
        assert_close(linear(x_SBI.flatten(0, 1)).view_as(expected), expected)
        assert_close(linear(x_SBI[2, 1]), expected[2, 1])


@pytest.mark.parametrize("router", AMONG_MANY)
def test_a_masked_expert_is_as_if_it_had_never_been_added(router: str, tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    expected = logits(routed(llama(), pool.subset(["e0", "e1", "e3"]), router=router))
    model = routed(llama(), pool, router=router)
    unmasked = logits(model)
    with model.without(["e2"]), model.trace() as trace:
        found = logits(model)
    assert_close(found, expected)
    assert all(trace.weights(site)[..., 2].max() == 0 for site in trace.sites)
    assert torch.equal(logits(model), unmasked)


@pytest.mark.parametrize("router", AMONG_MANY)
def test_more_masked_than_top_k_leaves(router: str, tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=3)
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "e1"))
    model = routed(llama(), pool, router=router, top_k=2)
    with model.without(["e0"]), model.without(["e2"]):
        assert_close(logits(model), expected)


@pytest.mark.parametrize("router", AMONG_MANY)
def test_absent_experts_are_never_chosen(router: str, tmp_path: Path) -> None:
    """Two of three experts adapt q_proj alone, so the third carries all tokens elsewhere."""
    folders = [
        complete(make_expert(llama, tmp_path / f"e{i}", seed=i, target_modules=targets), seed=i)
        for i, targets in enumerate((["q_proj"], ["q_proj"], ["q_proj", "up_proj"]))
    ]
    model = routed(llama(), fill_pool(tmp_path / "pool", "tiny-llama", folders), router=router, top_k=2)
    with model.trace() as trace:
        logits(model)
    for site in trace.sites:
        if site.endswith("up_proj"):
            assert trace.weights(site)[..., :2].max() == 0
            # a prompt may belong to an expert that has nothing to say here; `merged` divides by all experts
            if router not in ("retrieval", "merged", "merged-parameters"):
                assert trace.weights(site)[..., 2].min() == 1
            elif router != "retrieval":
                torch.testing.assert_close(trace.weights(site)[..., 2], torch.full((2, 7), 1 / 3))


def test_masking_everything_is_refused(tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path, num_experts=2))
    fails(RouterError, "e0, e1", action=lambda: model.without(["e0", "e1"]).__enter__())
    fails(PoolError, "'e7'", action=lambda: model.without(["e7"]).__enter__())


@pytest.mark.parametrize("router", AMONG_MANY)
def test_a_missing_need_fails_by_name_before_anything_is_loaded(router: str, tmp_path: Path) -> None:
    """A bare adapter is enough for routers that need only the adapter."""
    whole = complete(make_expert(llama, tmp_path / "whole"), seed=0)
    pool = fill_pool(tmp_path / "pool", "tiny-llama", [whole, make_adapter(llama, tmp_path / "bare", seed=1)])
    needs = router_class(router).needs - {"adapter"}
    if not needs:
        logits(routed(llama(), pool, router=router))
        return
    error = fails(RouterError, f"router {router!r}", "bare", action=lambda: routed(llama(), pool, router=router))
    assert error.fix is not None
    assert error.fix.startswith(f"phatgoose {min(needs)}")
    assert "whole" not in error.what


# Each rule


def stack_of(pool: Pool, site: str) -> SiteStack:
    return stack_sites(pool.experts(), dtype=torch.float32, with_gates=True, with_activations=True)[site]


def updates(pool: Pool, site: str) -> torch.Tensor:
    """delta_EOI: each expert's update as a matrix."""
    stack = stack_of(pool, site)
    return torch.einsum("ero,eri->eoi", stack.b_ERO, stack.a_ERI)


SITE = "model.layers.1.mlp.down_proj"


def rule_inputs(tmp_path: Path, router: str, **options: Any) -> tuple[Pool, Any, torch.Tensor]:
    """A pool, a router's rule at one site, and activations."""
    pool = make_pool("llama", tmp_path, num_experts=6)
    linear = routed(llama(), pool, router=router, **options).routed_linears()[SITE]
    return pool, linear.router, torch.randn(50, linear.base.in_features, generator=torch.Generator().manual_seed(5))


def test_spectrum_is_the_svd(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, r=5)  # padded to 8
    values_ER, right_ERI = spectrum(stack_of(pool, SITE))
    _, expected_ES, vh_ESI = torch.linalg.svd(updates(pool, SITE).double(), full_matrices=False)
    torch.testing.assert_close(values_ER[:, :5].double(), expected_ES[:, :5], rtol=1e-5, atol=0)
    assert values_ER[:, 5:].eq(0).all()
    assert right_ERI[:, 5:].eq(0).all()
    cosines_ER = (right_ERI[:, :5].double() * vh_ESI[:, :5]).sum(-1).abs()
    torch.testing.assert_close(cosines_ER, torch.ones_like(cosines_ER), rtol=0, atol=1e-5)


@pytest.mark.parametrize("router", ["arrow", "arrow-peft"])
def test_arrow(router: str, tmp_path: Path) -> None:
    pool, rule, x_NI = rule_inputs(tmp_path, router, top_k=3)
    prototypes_EI = torch.linalg.svd(updates(pool, SITE).double()).Vh[:, 0]
    divisor = 10 * x_NI.shape[1] ** 0.5 if router == "arrow" else 1.0
    all_NE = torch.softmax((x_NI.double() @ prototypes_EI.T).abs() / divisor, dim=1)  # as the official code
    top_NK, ids_NK = all_NE.topk(3)
    assert torch.equal(rule(x_NI).expert_ids_NK, ids_NK)
    assert_close(rule(x_NI).weights_NK, top_NK / top_NK.sum(1, keepdim=True))


def test_arrow_is_pefts_own(tmp_path: Path) -> None:
    """PEFT finds the singular vector by 15 power iterations, so the first one must stand out."""
    folders = []
    for i in range(4):
        folder = make_adapter(llama, tmp_path / f"e{i}", seed=i)
        weights = load_file(folder / WEIGHTS_FILE)
        for name, tensor in weights.items():
            if "lora_A" in name:
                tensor[0] *= 8
        save_file(weights, folder / WEIGHTS_FILE)
        folders.append(folder)
    pool = fill_pool(tmp_path / "pool", "tiny-llama", folders)
    theirs = create_arrow_model(llama(), [str(folder) for folder in folders], ArrowConfig(top_k=2, rng_seed=0))
    ours = routed(llama(), pool, router="arrow-peft", top_k=2)
    inputs = model_inputs(ours)
    expected = logits(theirs.eval(), **inputs)
    assert_close(logits(ours, **inputs), expected, relative=1e-4)
    for site, linear in ours.routed_linears().items():
        layer = theirs.get_submodule(f"base_model.model.{site}").lora_arrow["arrow_router"]
        cosine_E = F.cosine_similarity(layer.prototypes, linear.router.prototypes_EI).abs()
        torch.testing.assert_close(cosine_E, torch.ones(4), rtol=0, atol=1e-5)


def test_average_activation(tmp_path: Path) -> None:
    pool, rule, x_NI = rule_inputs(tmp_path, "average-activation")
    vectors_EI = torch.stack([expert.load_activations()[SITE] for expert in pool.experts()])
    width = x_NI.shape[1:]
    scores_NE = F.layer_norm(x_NI, width) @ F.layer_norm(vectors_EI, width).T / width[0] ** 0.5
    top_NK, ids_NK = scores_NE.softmax(1).topk(2)
    assert torch.equal(rule(x_NI).expert_ids_NK, ids_NK)
    assert_close(rule(x_NI).weights_NK, top_NK / top_NK.sum(1, keepdim=True))


def test_spectr(tmp_path: Path) -> None:
    pool, rule, x_NI = rule_inputs(tmp_path, "spectr", top_k=4)
    # the norm of the projection on the row space, by least squares instead of singular vectors
    a_ERI = stack_of(pool, SITE).a_ERI.double()
    projections = [x_NI.double() @ torch.linalg.pinv(a_RI) @ a_RI for a_RI in a_ERI]
    scores_NE = torch.stack([p_NI.norm(dim=1) for p_NI in projections], dim=1)
    assert_close(rule.scores(x_NI), scores_NE)
    assert torch.equal(rule(x_NI).expert_ids_NK, scores_NE.topk(4).indices)
    assert torch.equal(rule(x_NI).weights_NK, torch.full((50, 4), 0.25))


@pytest.mark.parametrize("filter_k", [1, 2, 6])
def test_lag(filter_k: int, tmp_path: Path) -> None:
    pool, rule, x_NI = rule_inputs(tmp_path, "lag", filter_k=filter_k)
    vh_ESI = torch.linalg.svd(updates(pool, SITE)).Vh
    arrow_NE = (x_NI @ vh_ESI[:, 0].T).abs()
    spectr_NE = torch.einsum("ni,eri->ner", x_NI, vh_ESI[:, :8]).norm(dim=2)
    for n, found in enumerate(rule(x_NI).expert_ids_NK.squeeze(1).tolist()):
        candidates = arrow_NE[n].topk(filter_k).indices.tolist()
        assert found == max(candidates, key=lambda e, n=n: spectr_NE[n, e].item())
    assert rule(x_NI).weights_NK.eq(1).all()


@pytest.mark.parametrize("router", ["merged", "uniform"])
def test_merged_is_the_mean_update(router: str, tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path), router=router)
    for site, linear in model.routed_linears().items():
        x_NI = torch.randn(20, linear.base.in_features)
        assert_close(linear(x_NI) - linear.base(x_NI), x_NI @ updates(model.pool, site).mean(0).T, relative=1e-4)


def test_merged_parameters_is_the_product_of_means(tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path), router="merged-parameters")
    for site, linear in model.routed_linears().items():
        stack = stack_of(model.pool, site)
        x_NI = torch.randn(20, linear.base.in_features)
        expected = x_NI @ stack.a_ERI.mean(0).T @ stack.b_ERO.mean(0)
        assert_close(linear(x_NI) - linear.base(x_NI), expected, relative=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_single_is_peft(kind: str, tmp_path: Path) -> None:
    pool = make_pool(kind, tmp_path)
    expected = logits(PeftModel.from_pretrained(MODELS[kind](), tmp_path / "e2"))
    assert_close(logits(routed(MODELS[kind](), pool, router="single", expert="e2")), expected)


def test_single_needs_a_name_and_others_refuse_one(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=2)
    for options in ({"router": "single"}, {"router": "single", "expert": "e5"}, {"router": "arrow", "expert": "e0"}):
        error = fails(RouterError, "e0, e1", action=lambda options=options: routed(llama(), pool, **options))
        assert error.fix == "--router single --expert e0"


# Routers that read prompts


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
@pytest.mark.parametrize("router", ["retrieval", "glider", "phatgoose-prior"])
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
    assert all(linear.prompt_bias_BE is None for linear in model.routed_linears().values())


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
        routing = linear.router(x_BSI.flatten(0, 1), linear.prompt_bias_BE.repeat_interleave(5, 0))
    scores_BSE = plain.scores(x_BSI.flatten(0, 1)).view(2, 5, 2) + 7 * cosine_BE[:, None]
    expected = scores_BSE.softmax(-1).flatten(0, 1)
    found = torch.zeros(10, 2).scatter(1, routing.expert_ids_NK, routing.weights_NK)
    assert_close(found, expected)


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
        for linear in model.routed_linears().values():
            assert_close(linear.prompt_bias_BE, torch.stack(expected))


def test_prior_is_added_to_the_gates_scores(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    model = routed(llama(), pool, router="phatgoose-prior")
    plain = routed(llama(), pool, router="phatgoose").routed_linears()[SITE].router
    x_BSI = torch.randn(2, 5, 44)
    with model.prompts(IDS[:2].tolist()), model.trace() as trace:
        linear = model.routed_linears()[SITE]
        bias_BE = linear.prompt_bias_BE
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
    assert all(linear.record is None for linear in model.routed_linears().values())


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


def test_unknown_options_and_routers(tmp_path: Path) -> None:
    pool = make_pool("gpt2", tmp_path, num_experts=2)
    fails(ConfigError, "'warmth'", "temperature", action=lambda: routed(gpt2(), pool, warmth=2))
    fails(RouterError, "'nearest'", "arrow", action=lambda: routed(gpt2(), pool, router="nearest"))
    fails(RouterError, "top_k 3", action=lambda: routed(gpt2(), pool, router="arrow", top_k=3))
    assert Expert(tmp_path / "e0").brings("gate")
