"""Parity with the official code: every number of golden/ that the package can compute.

Names and formulas: golden/README.md. Tolerance: 1e-5 of the largest magnitude, in fp32.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file

from helpers.checks import assert_close
from helpers.data import as_text
from helpers.golden import BASE, GOLDEN, base, by_site, golden, inputs, logits
from helpers.models import EOS, PAD, make_tokenizer
from helpers.pools import provenance
from phatgoose.config import GateConfig
from phatgoose.data.examples import Example
from phatgoose.experts.expert import Expert
from phatgoose.experts.official import import_official
from phatgoose.experts.pool import Pool
from phatgoose.experts.vectors import save_gate
from phatgoose.kernels import BACKENDS
from phatgoose.routing.model import RoutedModel
from phatgoose.training.gated import GatedModel
from phatgoose.training.single import train_gate
from phatgoose.training.trainer import target_loss


@pytest.fixture(scope="module", params=["official_checkpoint.pt", "official_checkpoint.safetensors"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return import_official(GOLDEN / request.param, base(), BASE, tmp_path_factory.mktemp("golden") / "pool")


def test_import_takes_over_every_tensor(pool: Pool) -> None:
    assert pool.names == ("expert-00", "expert-01", "expert-02", "expert-03", "expert-04")
    assert pool.check(base()) == []
    official = golden("official_checkpoint")
    for i, expert in enumerate(pool.experts()):
        weights, gates = dict(expert.adapter.load()), expert.load_gate()
        assert len(weights) == len(gates) == 36
        for site, (a_RI, b_OR, scaling) in weights.items():
            assert torch.equal(a_RI.T, official[f"{site}._addons.expert_lora.layer1__{i}"])
            assert torch.equal(b_OR.T, official[f"{site}._addons.expert_lora.layer2__{i}"])
            assert torch.equal(gates[site], official[f"{site}._addons.router.expert_embeddings__{i}"])
            assert scaling == 1 / 16


@pytest.mark.parametrize("stage", ["adapter", "gate"])
def test_import_of_a_single_expert(stage: str, tmp_path: Path) -> None:
    """The official keys while one expert's adapter, and then its gate, is trained."""
    tensors = {}
    for key, tensor in golden("official_checkpoint").items():
        site, _, part = key.partition("._addons.")
        if stage == "adapter" and part == "expert_lora.layer1__4":
            tensors[f"{site}.expert_lora_a"] = tensor.T.contiguous()
        elif stage == "adapter" and part == "expert_lora.layer2__4":
            tensors[f"{site}.expert_lora_b"] = tensor.T.contiguous()
        elif stage == "gate" and part == "router.expert_embeddings__4":
            tensors[f"{site}._addons.expert_lora.expert_input_gate"] = tensor
        elif stage == "gate" and part.startswith("expert_lora") and part.endswith("__4"):
            tensors[key.replace("__4", "__0")] = tensor
    save_file(tensors, tmp_path / "single.safetensors")
    pool = import_official(tmp_path / "single.safetensors", base(), BASE, tmp_path / "pool", names=["four"])
    assert pool.expert("four").has_gate == (stage == "gate")
    found = logits(PeftModel.from_pretrained(base(), pool.expert("four").folder))
    assert_close(found, golden("outputs")["logits_single_expert_4"])


def test_base_logits() -> None:
    assert_close(logits(base()), golden("outputs")["logits_base"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_logits_and_loss(pool: Pool, top_k: int, backend: str) -> None:
    found = logits(RoutedModel.from_pool(base(), pool, top_k=top_k, backend=backend))
    assert_close(found, golden("outputs")[f"logits_topk{top_k}"])
    loss = target_loss(found, golden("inputs")["labels"])
    assert_close(loss, golden("outputs")[f"loss_topk{top_k}"])


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_routing_weights_of_all_sites(pool: Pool, top_k: int) -> None:
    """The official softmax runs over all experts; deeper sites depend on the routing before, so each is fed alone."""
    model = RoutedModel.from_pool(base(), pool, top_k=2)
    sites = by_site("routing", "routing_weights.")
    assert sites.keys() == model.routed_linears().keys()
    entered = {}
    for site, linear in model.routed_linears().items():
        linear.register_forward_pre_hook(lambda _, args, site=site: entered.update({site: args[0]}))
    logits(model)
    for site, linear in model.routed_linears().items():
        linear.router.top_k = top_k
        weights_NK, expert_ids_NK = linear.router(entered[site].flatten(0, -2))
        top_NK, top_ids_NK = sites[site].flatten(0, -2).topk(top_k)
        assert torch.equal(expert_ids_NK, top_ids_NK), site
        assert_close(weights_NK, top_NK / top_NK.sum(-1, keepdim=True))


def test_trace_holds_the_official_routing(pool: Pool) -> None:
    model = RoutedModel.from_pool(base(), pool)
    with model.trace() as trace:
        logits(model)
    for site, all_BSE in by_site("routing", "routing_weights.").items():
        top_BSK, ids_BSK = all_BSE.topk(2)
        expected = torch.zeros_like(all_BSE).scatter(2, ids_BSK, top_BSK / top_BSK.sum(-1, keepdim=True))
        assert_close(trace.weights(site), expected)


def test_output_of_single_sites(pool: Pool) -> None:
    model = RoutedModel.from_pool(base(), pool)
    for site, expected in by_site("debug", "output.").items():
        with torch.no_grad():
            assert_close(model.routed_linears()[site](golden("debug")[f"input.{site}"]), expected)


def test_greedy_generation_and_its_routing(pool: Pool) -> None:
    model = RoutedModel.from_pool(base(), pool)
    ids = {name: golden("inputs")[name] for name in ("input_ids", "attention_mask")}
    with model.trace() as trace:
        found = model.generate(**ids, max_length=13, do_sample=False, num_beams=1)
    assert torch.equal(found, golden("outputs")["generated_ids"])
    ((site, all_BSE),) = by_site("debug", "generation_routing_weights.").items()
    top_BSK, ids_BSK = all_BSE.topk(2)
    assert torch.equal(trace.routing(site).expert_ids_BSK, ids_BSK)
    assert_close(trace.routing(site).weights_BSK, top_BSK / top_BSK.sum(-1, keepdim=True))


@pytest.mark.parametrize("i", [0, 4])
def test_single_expert_here_and_in_peft(pool: Pool, i: int) -> None:
    expected = golden("outputs")[f"logits_single_expert_{i}"]
    name = f"expert-{i:02d}"
    assert_close(logits(RoutedModel.from_pool(base(), pool.subset([name]), top_k=1)), expected)
    assert_close(logits(PeftModel.from_pretrained(base(), pool.expert(name).folder)), expected)


@pytest.mark.parametrize("numbers", ["average_activation", "svd_orth"])
def test_logits_with_other_vectors_as_gates(pool: Pool, numbers: str, tmp_path: Path) -> None:
    if numbers == "average_activation":
        gates = by_site(numbers, "router_embeddings.")
        expected = golden(numbers)["logits"]
    else:
        gates = {site: nearest_orthogonal(pool, site) for site in pool.experts()[0].shapes}
        expected = golden("baselines")["svd_orth.logits"]
        for site, gates_EI in by_site("baselines", "svd_orth.router_embeddings.").items():
            assert_close(gates[site], gates_EI)
    other = import_official(GOLDEN / "official_checkpoint.safetensors", base(), BASE, tmp_path / "pool")
    for i, expert in enumerate(other.experts()):
        vectors = {site: gates_EI[i] for site, gates_EI in gates.items()}
        save_gate(expert.folder, vectors, provenance(expert.folder))
    assert_close(logits(RoutedModel.from_pool(base(), other)), expected)


def nearest_orthogonal(pool: Pool, site: str) -> torch.Tensor:
    gates_EI = torch.stack([expert.load_gate()[site] for expert in pool.experts()])
    norms_E1 = gates_EI.norm(dim=1, keepdim=True)
    u, _, vt = torch.linalg.svd(gates_EI / norms_E1, full_matrices=False)
    return (u @ vt) * norms_E1


def test_gate_gradients_at_zero(pool: Pool) -> None:
    gated = GatedModel(base(), pool.expert("expert-00"))
    loss = target_loss(gated(**inputs()).logits, golden("inputs")["labels"])
    loss.backward()
    assert_close(loss, golden("gate_training")["loss_at_zero_gate"])
    assert_close(logits(gated), golden("gate_training")["logits_at_zero_gate"])
    expected = by_site("gate_training", "grad_at_zero_gate.")
    assert gated.gates().keys() == expected.keys()
    for site, gate_I in gated.gates().items():
        assert_close(gate_I.grad, expected[site])


def test_three_steps_of_gate_training(pool: Pool) -> None:
    numbers = golden("gate_training")
    gated = GatedModel(base(), pool.expert("expert-00"))
    gates = list(gated.gates().values())
    optimizer = torch.optim.AdamW(gates, lr=5e-3, weight_decay=0.0)
    losses, norms = [], []
    for _ in range(3):
        loss = target_loss(gated(**inputs()).logits, golden("inputs")["labels"])
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(gates, 1.0))
        optimizer.step()
        losses.append(loss.detach())
    assert_close(torch.stack(losses), numbers["losses_before_steps_1_2_3"])
    assert_close(torch.stack(norms), numbers["grad_norms"])
    assert_close(logits(gated), numbers["logits_after_3_steps"])
    assert_close(target_loss(logits(gated), golden("inputs")["labels"]), numbers["loss_after_3_steps"])
    assert_official_gates(gated.gates())


def test_train_gate_makes_the_official_gates(pool: Pool, tmp_path: Path) -> None:
    expert = Expert(shutil.copytree(pool.expert("expert-00").folder, tmp_path / "expert"))
    config = GateConfig(steps=3, batch_size=4, learning_rate=5e-3, warmup_ratio=0.06, clip=1.0)
    model = base()
    rows = zip(golden("inputs")["input_ids"], golden("inputs")["target_ids"], strict=True)
    examples = [
        Example(input=as_text(ids[ids != PAD].tolist()), target=as_text(target[target > EOS].tolist()))
        for ids, target in rows
    ]
    vectors = train_gate(model, make_tokenizer(model.config.vocab_size), expert, examples, config=config)
    assert_official_gates(vectors)
    assert_official_gates(Expert(expert.folder).load_gate())


def assert_official_gates(found: dict[str, torch.Tensor]) -> None:
    """AdamW divides by the gradient's size, so its smallest entries carry their rounding into the gate."""
    expected = by_site("gate_training", "gate_after_3_steps.")
    assert found.keys() == expected.keys()
    for site, gate_I in found.items():
        assert_close(gate_I.detach(), expected[site], relative=1e-4)
