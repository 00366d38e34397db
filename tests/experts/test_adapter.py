"""LoRA as PEFT computes it: every way to write an adapter, alone and mixed with others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from helpers.checks import assert_close, fails
from helpers.data import model_inputs
from helpers.models import MODELS, TARGETS, gpt2, llama, t5
from helpers.pools import fill_pool, make_adapter, make_expert, provenance
from phatgoose.errors import AdapterError, GateError
from phatgoose.experts.adapter import Adapter
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.vectors import GATE, save_gate
from phatgoose.routing.model import RoutedModel
from phatgoose.training.gated import GatedModel

# Everything that LoraConfig says about scale, rank and targets
VARIANTS: dict[str, dict[str, Any]] = {
    "alpha below r": {"r": 8, "lora_alpha": 3},
    "alpha above r": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 16, "lora_alpha": 5, "use_rslora": True},
    "all-linear": {"r": 3, "lora_alpha": 4, "target_modules": "all-linear"},
}
PATTERNS: dict[str, dict[str, Any]] = {
    "rank_pattern": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 5}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 1, "down_proj": 40}},
    "both, with rslora": {
        "rank_pattern": {"v_proj": 9, r".*0\.mlp\..*": 6},
        "alpha_pattern": {r".*\.self_attn\.(q|v)_proj": 7, "layers.0.mlp.up_proj": 2},
        "use_rslora": True,
    },
    "first match wins": {"rank_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 2}},
    "anchored": {"rank_pattern": {"^model.layers.0.self_attn.q_proj": 4, "^q_proj": 2}},
    "regex of targets": {"target_modules": r".*layers\.1\.(self_attn\.[qv]|mlp\.down)_proj"},
    "layers_to_transform": {"layers_to_transform": [1]},
    "exclude_modules": {"exclude_modules": ["o_proj", "down_proj"]},
    "dropout": {"lora_dropout": 0.4},
    "gaussian": {"init_lora_weights": "gaussian"},
}
CASES = [(kind, name) for kind in MODELS for name in VARIANTS] + [("llama", name) for name in PATTERNS]


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(**model_inputs(model)).logits


def scalings(model: PeftModel) -> dict[str, float]:
    """Site -> scale, as PEFT has it in memory."""
    modules = model.base_model.model.named_modules()
    return {name: m.scaling["default"] for name, m in modules if isinstance(m, LoraLayer)}


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_one_expert_is_peft(kind: str, variant: str, tmp_path: Path) -> None:
    factory, options = MODELS[kind], (VARIANTS | PATTERNS)[variant]
    folder = make_expert(factory, tmp_path / "only", **options)
    expected = PeftModel.from_pretrained(factory(), folder)
    adapter = Adapter(folder)
    assert {site: pytest.approx(adapter.config.scaling(site)) for site in adapter.shapes} == scalings(expected)

    model = RoutedModel.from_pool(factory(), fill_pool(tmp_path / "pool", factory().name_or_path, [folder]), top_k=1)
    assert list(model.routed_linears()) == [site for site, _ in factory().named_modules() if site in adapter.shapes]
    assert_close(logits(model), logits(expected))
    if variant != "gaussian":  # whose B is zero
        assert (logits(expected) - logits(factory())).abs().max() > 0.1


@pytest.mark.parametrize(("kind", "variant"), CASES)
def test_gates_are_trained_behind_the_same_scale(kind: str, variant: str, tmp_path: Path) -> None:
    """A gate of zeros is half open: half of PEFT's update."""
    folder = make_adapter(MODELS[kind], tmp_path / "only", **(VARIANTS | PATTERNS)[variant])
    expected = PeftModel.from_pretrained(MODELS[kind](), folder)
    for module in expected.modules():
        if isinstance(module, LoraLayer):
            module.scaling["default"] /= 2
    gated = GatedModel(MODELS[kind](), Expert(folder))
    assert_close(gated(**model_inputs(gated.model)).logits.detach(), logits(expected))


def test_weights_of_trained_experts_survive_bf16_on_disk(tmp_path: Path) -> None:
    """A bf16 adapter loads as it is and is widened, not truncated again."""
    model = PeftModel.from_pretrained(llama(), make_expert(llama, tmp_path / "fp32"))
    model.to(torch.bfloat16).save_pretrained(str(tmp_path / "bf16"))
    adapter = Adapter(tmp_path / "bf16")
    for (site, half), (_, whole) in zip(adapter.load(), Adapter(tmp_path / "fp32").load(), strict=True):
        assert half.a_RI.dtype == torch.bfloat16, site
        assert torch.equal(half.b_OR, whole.b_OR.bfloat16())


def mixed_pool(folder: Path) -> Pool:
    """Ranks, alphas, targets and variants that differ from expert to expert."""
    experts = [
        make_expert(llama, folder / "attention", 1, r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        make_expert(llama, folder / "everything", 2, r=24, lora_alpha=6),
        make_expert(llama, folder / "rslora", 3, r=9, lora_alpha=2, use_rslora=True, target_modules="all-linear"),
        make_expert(llama, folder / "patterns", 4, rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 40}),
        make_expert(llama, folder / "second-layer", 5, r=16, layers_to_transform=[1]),
    ]
    return fill_pool(folder / "pool", "tiny-llama", experts)


def by_hand(model: PreTrainedModel, pool: Pool, site: str, x_I: torch.Tensor, top_k: int) -> torch.Tensor:
    """One token at one site, from the paper's formula, in fp64 with PEFT's own A, B and scale."""
    scored = []
    for name in pool.names:
        peft = PeftModel.from_pretrained(model, pool.expert(name).folder).base_model
        layer = peft.model.get_submodule(site)
        if hasattr(layer, "lora_A"):
            a, b = (getattr(layer, half)["default"].weight.detach().double() for half in ("lora_A", "lora_B"))
            v_I = layer_norm(pool.expert(name).load_gate()[site])
            score = (v_I @ layer_norm(x_I) / math.sqrt(len(x_I))).item()
            scored.append((score, layer.scaling["default"] * (b @ (a @ x_I.double()))))
        peft.unload()
    chosen = sorted(scored, key=lambda pair: -pair[0])[:top_k]
    total = sum(math.exp(score) for score, _ in chosen)
    updates = [math.exp(score) / total * update for score, update in chosen]
    return model.get_submodule(site)(x_I).double() + torch.stack(updates).sum(0)


def layer_norm(u_I: torch.Tensor) -> torch.Tensor:
    u_I = u_I.double()
    return (u_I - u_I.mean()) / torch.sqrt(u_I.var(correction=0) + 1e-5)


@pytest.mark.parametrize("top_k", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)])
def test_mixture_of_unlike_experts_by_hand(top_k: int, tmp_path: Path) -> None:
    pool = mixed_pool(tmp_path)
    routed = RoutedModel.from_pool(llama(), pool, top_k=top_k)
    layer = "model.layers.{}."
    for site in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"):
        for i in (0, 1):
            linear = routed.routed_linears()[layer.format(i) + site]
            x_NI = torch.randn(3, linear.base.in_features, generator=torch.Generator().manual_seed(i))
            for x_I, found_O in zip(x_NI, linear(x_NI).detach(), strict=True):
                assert_close(found_O, by_hand(llama(), pool, layer.format(i) + site, x_I, top_k))


def test_absent_expert_is_never_chosen(tmp_path: Path) -> None:
    """Not even by a token that all present experts turn away from: a zero gate would win there."""
    pool = mixed_pool(tmp_path)
    site = "model.layers.0.self_attn.o_proj"  # adapted by experts 1, 2 and 3 alone
    routed = RoutedModel.from_pool(llama(), pool, top_k=2).routed_linears()[site]
    gates_EI = torch.stack([pool.expert(name).load_gate()[site] for name in ("everything", "rslora", "patterns")])
    x_NI = -gates_EI.mean(0) - torch.zeros(4, 1)
    scores_NE = routed.router.scores(x_NI)
    assert (scores_NE[:, 1:4] < 0).all()
    assert (scores_NE[:, [0, 4]] == 0).all()
    weights_NK, expert_ids_NK = routed.router(x_NI)
    assert torch.isin(expert_ids_NK, torch.tensor([1, 2, 3])).all()
    torch.testing.assert_close(weights_NK.sum(1), torch.ones(4))


def test_fewer_experts_at_a_site_than_top_k(tmp_path: Path) -> None:
    experts = [
        make_expert(gpt2, tmp_path / "both", 1, target_modules=["c_attn", "c_fc"]),
        make_expert(gpt2, tmp_path / "attention", 2, target_modules=["c_attn"]),
    ]
    model = RoutedModel.from_pool(gpt2(), fill_pool(tmp_path / "pool", "tiny-gpt2", experts), top_k=2)
    with model.trace() as trace:
        assert logits(model).isfinite().all()
    for site in trace.sites:
        weights_BSE = trace.weights(site)
        torch.testing.assert_close(weights_BSE.sum(2), torch.ones(2, 7))
        if site.endswith("c_fc"):
            assert (weights_BSE[..., 1] == 0).all()


def test_order_of_sites_follows_the_targets(tmp_path: Path) -> None:
    """All the linear layers of an encoder-decoder model, and only those."""
    found = set(Adapter(make_adapter(t5, tmp_path / "a")).shapes)
    assert found == {name for name, _ in t5().named_modules() if name.rsplit(".", 1)[-1] in TARGETS["t5"]}


# What PEFT can save and a sum of low-rank updates cannot express
UNROUTABLE: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "bias": ({"bias": "lora_only"}, "bias 'lora_only'"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "token indices": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "'pissa'"),
    "OLoRA": ({"init_lora_weights": "olora"}, "'olora'"),
    "aLoRA": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
    "embedding": ({"target_modules": ["wte", "c_attn"]}, "wte"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", UNROUTABLE)
def test_what_cannot_be_routed_is_refused(case: str, tmp_path: Path) -> None:
    options, word = UNROUTABLE[case]
    folder = make_adapter(gpt2, tmp_path / "strange", **options)
    error = fails(AdapterError, str(folder), word, action=lambda: Adapter(folder))
    assert error.found
    assert error.expected
    assert error.fix


def test_ia3_is_refused(tmp_path: Path) -> None:
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM")
    get_peft_model(llama(), config).save_pretrained(str(tmp_path))
    fails(AdapterError, "peft_type 'IA3'", "'LORA'", action=lambda: Adapter(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"r": "eight"},
        {"r": 0},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"use_rslora": "no"},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"q_proj": -1}},
        {"alpha_pattern": {"(": 1}},
        {"base_model_name_or_path": 5},
        {"revision": ["main"]},
    ],
    ids=str,
)
def test_values_that_peft_never_writes(wrong: dict[str, Any], tmp_path: Path) -> None:
    path = make_adapter(llama, tmp_path) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | wrong))
    ((key, value),) = wrong.items()
    fails(AdapterError, str(path), f"{key}: {value!r}", action=lambda: Adapter(tmp_path))


@pytest.mark.parametrize("case", ["half", "strange", "nothing"])
def test_tensors_that_are_no_lora_pair(case: str, tmp_path: Path) -> None:
    path = make_adapter(llama, tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    if case == "half":
        del tensors[key]
    elif case == "strange":
        tensors["base_model.model.lm_head.weight"] = torch.ones(2, 2)
    save_file({} if case == "nothing" else tensors, path)
    words = {"half": "layers.0.self_attn.q_proj", "strange": "lm_head.weight", "nothing": "no tensors"}
    fails(AdapterError, str(tmp_path), words[case], action=lambda: Adapter(tmp_path))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda v: v.pop("model.layers.0.mlp.up_proj"), "the gate has no site model.layers.0.mlp.up_proj"),
        (lambda v: v.update(lm_head=torch.ones(3)), "the adapter has no site lm_head"),
        (lambda v: v.update({"model.layers.0.mlp.up_proj": torch.ones(31)}), "(31,)"),
    ],
)
def test_gate_that_does_not_fit(change: Any, word: str, tmp_path: Path) -> None:
    adapter = Adapter(make_adapter(llama, tmp_path))
    vectors = {site: torch.ones(shape.in_features) for site, shape in adapter.shapes.items()}
    change(vectors)
    save_gate(tmp_path, vectors, provenance(tmp_path))
    error = fails(GateError, str(tmp_path), word, action=lambda: GATE.load(adapter))
    assert str(error.fix).startswith("phatgoose gate ")


@pytest.mark.parametrize("metadata", [None, {"provenance": "[]"}, {"provenance": '{"format": 2}'}, {"provenance": "{"}])
def test_gate_of_no_known_format(metadata: dict[str, str] | None, tmp_path: Path) -> None:
    adapter = Adapter(make_adapter(llama, tmp_path))
    save_file({"x.gate": torch.ones(1)}, tmp_path / "gate.safetensors", metadata=metadata)
    fails(GateError, "gate.safetensors", "phatgoose gate", action=lambda: GATE.load(adapter))
