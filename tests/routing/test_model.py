"""A routed model behaves as the Hugging Face model that it wraps, and as its experts promise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.checks import assert_close, fails, files_of
from helpers.data import model_inputs, token_ids
from helpers.models import MODELS, PAD, gpt2, llama, make_base, make_tokenizer, paged_cache, t5
from helpers.pools import fill_pool, make_adapter, make_expert, make_gate, make_pool
from phatgoose.errors import BaseModelError, ConfigError, RouterError
from phatgoose.experts.pool import Pool
from phatgoose.models.base import load_base
from phatgoose.routing.model import RoutedModel

KINDS = list(MODELS)


@torch.no_grad()
def logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    return model(**(inputs or model_inputs(model))).logits


def routed(kind: str, folder: Path, num_experts: int = 4, **options: Any) -> RoutedModel:
    return RoutedModel.from_pool(MODELS[kind](), make_pool(MODELS[kind], folder, num_experts), **options)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_updates_are_the_base(kind: str, tmp_path: Path) -> None:
    for i in range(2):
        folder = make_adapter(MODELS[kind], tmp_path / f"e{i}", seed=i)
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({k: t * 0 if "lora_B" in k else t for k, t in weights.items()}, folder / "adapter_model.safetensors")
        make_gate(folder, i)
    pool = fill_pool(tmp_path / "pool", MODELS[kind]().config._name_or_path, [tmp_path / "e0", tmp_path / "e1"])
    assert torch.equal(logits(RoutedModel.from_pool(MODELS[kind](), pool)), logits(MODELS[kind]()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_experts_does_not_matter(kind: str, tmp_path: Path) -> None:
    model = routed(kind, tmp_path)
    expected = logits(model)
    turned = model.pool.subset(model.pool.names[::-1])
    assert_close(logits(RoutedModel.from_pool(model.unwrap(), turned)), expected)


def test_names_of_experts_do_not_matter(tmp_path: Path) -> None:
    """Not even names that look like numbers, modules, tensors or PEFT's own."""
    model = routed("llama", tmp_path)
    expected = logits(model)
    pool = Pool.create(tmp_path / "renamed", "tiny-llama")
    names = ("adapter_1", "0", "model.layers.0", "default")
    for i, name in enumerate(names):
        pool.add(tmp_path / f"e{i}", name)
    again = RoutedModel.from_pool(model.unwrap(), Pool.open(pool.folder))
    with again.trace() as trace:
        assert torch.equal(logits(again), expected)
    assert trace.expert_names == names


def test_padded_ranks_do_not_matter(tmp_path: Path) -> None:
    small = [make_expert(llama, tmp_path / f"e{i}", seed=i, r=3) for i in range(3)]
    pool = fill_pool(tmp_path / "pool", "tiny-llama", small)
    make_expert(llama, tmp_path / "large", seed=9, r=40)
    expected = logits(RoutedModel.from_pool(llama(), pool, top_k=1))
    # with gates of zeros the large expert scores 0 and is chosen only where all others score below
    pool.add(tmp_path / "large")
    model = RoutedModel.from_pool(llama(), pool, top_k=1)
    for linear in model.routed_linears().values():
        assert linear.a_ERI.shape[1] == 40
        linear.router.absent_E[3] = -torch.inf
    assert_close(logits(model), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_sum_to_one(kind: str, tmp_path: Path) -> None:
    model = routed(kind, tmp_path, top_k=3)
    with model.trace() as trace:
        logits(model)
    assert len(trace.sites) == len(model.routed_linears())
    for site in trace.sites:
        weights, ids = trace.routing(site)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:2]))
        assert all(len(set(row)) == 3 for row in ids.flatten(0, 1).tolist())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_alone_padded_and_continued_route_identically(kind: str, tmp_path: Path) -> None:
    model = routed(kind, tmp_path)
    ids = token_ids(1, 9)
    with model.trace() as alone:
        expected = logits(model, input_ids=ids)

    padded = torch.cat([torch.full((1, 5), PAD), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, 9)], dim=1).long()
    other = token_ids(1, 14, seed=3)
    batch = {
        "input_ids": torch.cat([padded, other]),
        "attention_mask": torch.cat([mask, torch.ones(1, 14).long()]),
        "position_ids": torch.cat([(mask.cumsum(1) - 1).clamp(min=0), torch.arange(14).view(1, -1)]),
    }
    with model.trace() as in_batch:
        assert_close(logits(model, **batch)[:1, 5:], expected)

    with model.trace() as continued, torch.no_grad():
        first = model(input_ids=ids[:, :6], use_cache=True)
        steps = [first.logits]
        cache = first.past_key_values
        for t in range(6, 9):
            step = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
    assert_close(torch.cat(steps, dim=1), expected)

    for site in alone.sites:
        weights, chosen = alone.routing(site)
        for found in (in_batch.routing(site), continued.routing(site)):
            assert torch.equal(found.expert_ids_BSK[:1, -9:], chosen)
            torch.testing.assert_close(found.weights_BSK[:1, -9:], weights)


def test_t5_in_a_padded_batch(tmp_path: Path) -> None:
    model = routed("t5", tmp_path)
    ids, decoder_ids = token_ids(1, 6), token_ids(1, 4, seed=1)
    expected = logits(model, input_ids=ids, decoder_input_ids=decoder_ids)
    batch = {
        "input_ids": torch.cat([torch.cat([ids, torch.full((1, 3), PAD)], 1), token_ids(1, 9, seed=2)]),
        "attention_mask": torch.tensor([[1] * 6 + [0] * 3, [1] * 9]),
        "decoder_input_ids": decoder_ids.expand(2, -1),
    }
    assert_close(logits(model, **batch)[:1], expected)


GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "no cache": {"do_sample": False, "use_cache": False},
    "sampling": {"do_sample": True, "top_k": 10, "temperature": 0.9},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", GENERATION)
def test_generate(kind: str, how: str, tmp_path: Path) -> None:
    """One expert at top_k=1 must generate what PEFT's model generates, in every way."""
    from peft import PeftModel

    model = routed(kind, tmp_path, 1, top_k=1)
    peft_model = PeftModel.from_pretrained(MODELS[kind](), str(tmp_path / "e0"))
    ids = token_ids(3, 6)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = PAD, 0  # left padding
    found = []
    for each in (model, peft_model):
        torch.manual_seed(5)
        found.append(each.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **GENERATION[how]))
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("kind", KINDS)
def test_generate_with_a_pool(kind: str, tmp_path: Path) -> None:
    model = routed(kind, tmp_path)
    ids = token_ids(2, 6)
    with model.trace() as trace:
        cached = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
    plain = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False, use_cache=False
    )
    assert torch.equal(cached, plain)
    last = trace.sites[-1]  # of the decoder, for T5
    assert trace.routing(last).weights_BSK.shape == (2, cached.shape[1] - 1, 2)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generate_batch_is_generate(kind: str, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model = routed(kind, tmp_path)
    prompts = [token_ids(1, n, seed=n)[0].tolist() for n in (5, 8, 3)]
    config = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    # or it makes a cache as large as the memory
    cache = paged_cache(16, num_blocks=8, max_batch_tokens=64)
    outputs = model.generate_batch(prompts, config, cache)
    found = sorted((list(out.prompt_ids), list(out.generated_tokens)) for out in outputs.values())
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append((prompt, out[0, len(prompt) :].tolist()))
    assert found == sorted(expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16(kind: str, tmp_path: Path) -> None:
    model = routed(kind, tmp_path)
    exact = logits(model)
    half = RoutedModel.from_pool(MODELS[kind]().to(torch.bfloat16), model.pool)
    found = logits(half)
    assert found.dtype == torch.bfloat16
    # a token whose two best experts are close may choose another one, so the error is not only rounding
    assert ((found.float() - exact).norm() / exact.norm()).item() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_unwrap_gives_the_very_same_model_back(kind: str, tmp_path: Path) -> None:
    base = MODELS[kind]()
    modules, tensors = dict(base.named_modules()), {k: t.clone() for k, t in base.state_dict().items()}
    model = RoutedModel.from_pool(base, make_pool(MODELS[kind], tmp_path))
    logits(model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in base.parameters())
    assert model.unwrap() is base
    assert dict(base.named_modules()) == modules
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in base.state_dict().items())
    model = RoutedModel.from_pool(base, Pool.open(tmp_path / "pool"))
    with pytest.raises(Exception, match="routed already"):
        RoutedModel.from_pool(base, Pool.open(tmp_path / "pool"))


def test_nothing_that_is_loaded_is_changed(tmp_path: Path) -> None:
    model = routed("llama", tmp_path)
    files = files_of(tmp_path)

    def tensors() -> dict[str, torch.Tensor]:
        return dict([*model.named_parameters(), *model.named_buffers()])

    before = {name: tensor.clone() for name, tensor in tensors().items()}
    assert any("a_ERI" in name for name in before)
    with model.trace():
        logits(model)
    model.generate(input_ids=token_ids(2, 6), max_new_tokens=4, do_sample=True)
    assert list(tensors()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors().items())
    assert files_of(tmp_path) == files


def test_traces_do_not_nest_and_leave_nothing(tmp_path: Path) -> None:
    model = routed("gpt2", tmp_path)
    with model.trace() as trace:
        with pytest.raises(RuntimeError, match="nest"), model.trace():
            pass
        logits(model)
    before = trace.routing(trace.sites[0]).weights_BSK.shape
    logits(model)
    assert trace.routing(trace.sites[0]).weights_BSK.shape == before


def test_labels_give_a_loss_and_gradients_flow(tmp_path: Path) -> None:
    for factory in (llama, gpt2, t5):
        model = RoutedModel.from_pool(factory(), make_pool(factory, tmp_path / factory.__name__))
        loss = model(input_ids=token_ids(2, 6), labels=token_ids(2, 6, seed=1)).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_inputs_of_any_layout(tmp_path: Path) -> None:
    model = routed("llama", tmp_path)
    linear = model.routed_linears()["model.layers.0.self_attn.q_proj"]
    x = torch.randn(32, 5, 2).transpose(0, 2)  # not contiguous, shape (2, 5, 32)
    assert not x.is_contiguous()
    with torch.no_grad():
        assert_close(linear(x), linear(x.contiguous()))
        assert_close(linear(x[0, 0]), linear(x)[0, 0])
        assert linear(x[:0]).shape == (0, 5, 32)


def wide_llama() -> Any:
    """bitsandbytes quantises blocks of 64 numbers of a row."""
    torch.manual_seed(0)
    config = llama().config
    config.update({"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "_name_or_path": "wide-llama"})
    return type(llama())(config)


@pytest.mark.parametrize("quantization", ["4bit", "8bit"])
def test_quantised_base(quantization: Any, tmp_path: Path) -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from phatgoose.models.base import load_base

    make_pool(wide_llama, tmp_path)
    pool = Pool.open(tmp_path / "pool")
    wide_llama().save_pretrained(tmp_path / "wide-llama")
    base = load_base(str(tmp_path / "wide-llama"), dtype="fp32", device="cpu", quantization=quantization)
    model = RoutedModel.from_pool(base, pool)
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    linears = model.routed_linears()
    assert all(isinstance(linear.base, kinds) for linear in linears.values())
    linear = linears["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        exact = RoutedModel.from_pool(wide_llama(), pool).routed_linears()["model.layers.0.self_attn.q_proj"]
        # only the base layer's part is quantised
        assert_close(linear(x) - linear.base(x), exact(x) - exact.base(x), 1e-4)
    assert logits(model).isfinite().all()


def test_one_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loaded base, its name or None; a pool or its folder: one model."""
    monkeypatch.chdir(tmp_path)
    pool = make_pool(llama, tmp_path, 3)
    make_base(llama, tmp_path / "tiny-llama")
    expected = logits(RoutedModel.from_pool(load_base("tiny-llama", device="cpu"), pool))
    for name, where in (("tiny-llama", pool), (None, pool), (None, pool.folder), ("tiny-llama", str(pool.folder))):
        model = RoutedModel.from_pool(name, where, device="cpu", dtype="fp32")
        assert torch.equal(logits(model), expected)
    half = RoutedModel.from_pool(None, pool, dtype="bf16")
    assert half.dtype == torch.bfloat16 and half.num_experts == 3
    assert half.tokenizer("<5>")["input_ids"] == make_tokenizer()("<5>")["input_ids"]
    given = make_tokenizer()
    assert RoutedModel.from_pool(None, pool, tokenizer=given).tokenizer is given


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    """Found out before a base is loaded: this one does not exist."""
    pool = make_pool(llama, tmp_path, 3)
    fails(BaseModelError, "another base model", action=lambda: RoutedModel.from_pool("elsewhere", pool))
    fails(RouterError, "top_k 4", action=lambda: RoutedModel.from_pool(None, pool, top_k=4))
    fails(ConfigError, "how to load", "bf16", action=lambda: RoutedModel.from_pool(llama(), pool, dtype="bf16"))
    fails(ConfigError, "unknown backend", action=lambda: RoutedModel.from_pool(None, pool, backend="fast"))
    fails(BaseModelError, "tiny-llama", action=lambda: RoutedModel.from_pool(None, pool))
