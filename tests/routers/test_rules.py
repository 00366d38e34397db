"""Each router's rule against a derivation of a few lines, PEFT's Arrow against its own layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import ArrowConfig, PeftModel, create_arrow_model
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from helpers.checks import assert_close, fails
from helpers.data import model_inputs
from helpers.models import MODELS, llama
from helpers.pools import fill_pool, make_adapter
from helpers.routing import logits, make_pool, routed
from phatgoose.errors import RouterError
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.pool import Pool
from phatgoose.experts.stack import SiteStack, stack_sites
from phatgoose.routers.spectrum import spectrum


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


def test_phatgoose_raw(tmp_path: Path) -> None:
    """The logit that a gate was trained as; standardised, the same gates choose otherwise."""
    pool, rule, x_NI = rule_inputs(tmp_path, "phatgoose-raw")
    gates_EI = torch.stack([expert.load_gate()[SITE] for expert in pool.experts()])
    top_NK, ids_NK = (x_NI @ gates_EI.T).topk(2)
    assert torch.equal(rule(x_NI).expert_ids_NK, ids_NK)
    assert_close(rule(x_NI).weights_NK, torch.softmax(top_NK, dim=1))
    standardised = rule_inputs(tmp_path / "again", "phatgoose")[1]
    assert (standardised(x_NI).expert_ids_NK != ids_NK).any()


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
