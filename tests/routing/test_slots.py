"""Experts come and go in the slots of a model that stays where it is: as if it had been built so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checks import assert_close, fails, files_of
from helpers.data import model_inputs, token_ids
from helpers.models import llama, t5
from helpers.pools import make_adapter, make_expert
from helpers.routing import AMONG_MANY, complete, logits, make_pool, routed
from phatgoose.analysis.recorder import record_tasks
from phatgoose.errors import ConfigError, GateError, PoolError, RouterError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.routing.model import RoutedModel

FEW_LAYERS = ["q_proj", "down_proj"]


def expert(folder: Path, seed: int, **lora: Any) -> Expert:
    """One more, which brings along whatever any router needs."""
    return Expert(complete(make_expert(llama, folder / f"e{seed}", seed=seed, **lora), seed=seed))


def tensors(model: RoutedModel) -> dict[str, torch.Tensor]:
    """What may be written in place: all that is not the base model's."""
    return {
        f"{site}.{name}": t for site, linear in model.routed_linears().items() for name, t in linear.named_buffers()
    }


def places(model: RoutedModel) -> dict[str, tuple[int, torch.Size]]:
    return {name: (t.data_ptr(), t.shape) for name, t in tensors(model).items()}


def by_name(model: RoutedModel, **inputs: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, every site's routing weights with the experts in the order of their names)."""
    with model.trace() as trace:
        found = logits(model, **inputs)
    order = [trace.expert_names.index(name) for name in sorted(model.pool.names)]
    empty = [e for e, name in enumerate(trace.expert_names) if not name]
    weights = {site: trace.weights(site) for site in trace.sites}
    assert all(weights_BSE[..., empty].eq(0).all() for weights_BSE in weights.values())
    return found, {site: weights_BSE[..., order] for site, weights_BSE in weights.items()}


def check(model: RoutedModel, base: Any, **options: Any) -> None:
    """It is the model that is built on its pool from scratch."""
    found, expected = (by_name(each) for each in (model, routed(base, model.pool, **options)))
    assert_close(found[0], expected[0])
    for site, weights in expected[1].items():
        torch.testing.assert_close(found[1][site], weights)


@pytest.mark.parametrize("router", AMONG_MANY)
def test_as_if_built_so(router: str, tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=3)
    on_disk = files_of(pool.folder)
    model = routed(llama(), pool, router=router, capacity=5)
    before = places(model)
    check(model, llama(), router=router)
    model.add_expert(expert(tmp_path, 3, r=3, target_modules=FEW_LAYERS))
    check(model, llama(), router=router)
    model.remove_expert("e1")
    check(model, llama(), router=router)
    model.add_expert(expert(tmp_path, 4))
    model.add_expert(expert(tmp_path, 5))
    check(model, llama(), router=router)
    assert model.slots.names == ["e0", "e4", "e2", "e3", "e5"]
    assert model.pool.names == ("e0", "e2", "e3", "e4", "e5")
    assert places(model) == before
    assert files_of(pool.folder) == on_disk


def test_an_encoder_decoder(tmp_path: Path) -> None:
    pool = make_pool("t5", tmp_path, num_experts=3)
    model = routed(t5(), pool.subset(["e0", "e1"]), capacity=3)
    model.add_expert(pool.expert("e2"))
    model.remove_expert("e0")
    check(model, t5())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_the_operators_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """Prototypes in two parts follow, bit by bit."""
    pool = make_pool("llama", tmp_path, num_experts=4)
    model = routed(llama().to(dtype), pool.subset(["e0", "e1", "e2"]), backend="triton", capacity=3)
    before = places(model)
    model.remove_expert("e1")
    assert all(linear.gates_HPI[:, 1].eq(0).all() for linear in model.routed_linears().values())
    model.add_expert(pool.expert("e3"))
    assert places(model) == before
    fresh = tensors(routed(llama().to(dtype), pool.subset(["e0", "e3", "e2"]), backend="triton", capacity=3))
    for name, found in tensors(model).items():
        assert torch.equal(found, fresh[name]), name


def test_masks_know_the_slots(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=4)
    model = routed(llama(), pool.subset(["e0", "e1", "e2"]), capacity=4)
    model.remove_expert("e0")
    model.add_expert(pool.expert("e3"))
    with model.trace() as trace:
        logits(model)
    assert trace.expert_names == ("e3", "e1", "e2", "")
    inputs = model_inputs(model)
    scratch = routed(llama(), model.pool)
    for names in (["e3"], ["e1", "e2"]):
        with model.without(names), scratch.without(names):
            found, expected = (by_name(each) for each in (model, scratch))
        assert_close(found[0], expected[0])
        assert all(torch.equal(found[1][s] == 0, expected[1][s] == 0) for s in expected[1])
    masked = [["e3"], []]
    with model.prompts(inputs["input_ids"].tolist(), masked), scratch.prompts(inputs["input_ids"].tolist(), masked):
        assert_close(logits(model), logits(scratch))


def test_a_layer_that_nobody_adapts_any_more_is_the_bases(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=1, target_modules=["q_proj"])
    pool.add(expert(tmp_path, 1, target_modules=["down_proj"]).folder)
    for backend in ("reference", "triton"):
        model = routed(llama(), pool, top_k=1, backend=backend, capacity=2)
        model.remove_expert("e1")
        check(model, llama(), top_k=1)
        found = model.routed_linears()["model.layers.0.mlp.down_proj"]
        x = torch.randn(3, 44)
        with torch.no_grad():
            assert torch.equal(found(x), found.base(x))


@pytest.mark.slow
def test_a_compiled_layer_follows(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=3)
    model = routed(llama(), pool.subset(["e0", "e1"]), backend="triton", capacity=3)
    linear, x = model.routed_linears()["model.layers.0.mlp.down_proj"], torch.randn(4, 44)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        before = compiled(x)
        with torch.compiler.set_stance("fail_on_recompile"):
            model.add_expert(pool.expert("e2"))
            model.remove_expert("e0")
            assert not torch.equal(compiled(x), before)
            torch.testing.assert_close(compiled(x), linear(x))


def refused(model: RoutedModel, error: Any, *words: str, action: Any) -> None:
    """It fails, and nothing has changed."""
    before = {name: t.clone() for name, t in tensors(model).items()}
    names, pool = list(model.slots.names), model.pool
    fails(error, *words, action=action)
    assert model.slots.names == names and model.pool is pool
    assert all(torch.equal(t, before[name]) for name, t in tensors(model).items())


def test_what_does_not_fit(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=2, target_modules=FEW_LAYERS)
    model = routed(llama(), pool, capacity=3)

    def refuse(error: Any, *words: str, folder: Path, name: str = "new") -> None:
        refused(model, error, *words, action=lambda: model.add_expert(Expert(folder, name)))

    same = {"target_modules": FEW_LAYERS}
    wide = make_expert(llama, tmp_path / "wide", r=9, **same)
    refuse(RouterError, "'new' has too large a rank at", "rank 9", "at most 8", "in its pool", folder=wide)
    other = make_expert(llama, tmp_path / "other", target_modules=["q_proj", "v_proj"])
    refuse(RouterError, "v_proj, which this model does not route", "in its pool", folder=other)
    refuse(PoolError, "already has an expert 'e0'", folder=tmp_path / "e0", name="e0")
    bare = make_adapter(llama, tmp_path / "bare", **same)
    refuse(RouterError, "needs a gate", "phatgoose gate", str(tmp_path / "pool"), folder=bare)
    refuse(PoolError, "another base model", "tiny-t5", folder=make_expert(t5, tmp_path / "t5"))
    torn = make_expert(llama, tmp_path / "torn", seed=7, **same)
    (torn / "gate.safetensors").write_bytes((torn / "gate.safetensors").read_bytes()[:-8])
    refuse(GateError, "gate.safetensors", folder=torn)
    refused(model, PoolError, "no expert 'e7'", action=lambda: model.remove_expert("e7"))
    model.add_expert(expert(tmp_path, 2, **same))
    extra = expert(tmp_path, 3, **same)
    refused(model, RouterError, "no slot is empty", "remove_expert", action=lambda: model.add_expert(extra))
    model.remove_expert("e2")
    model.remove_expert("e1")
    refused(model, RouterError, "'e0' is the last expert", action=lambda: model.remove_expert("e0"))


def test_models_without_slots(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=2)
    model = routed(llama(), pool)
    refused(model, RouterError, "fixed set", "capacity=4", action=lambda: model.remove_expert("e0"))
    extra = expert(tmp_path, 2)
    refused(model, RouterError, "fixed set", action=lambda: model.add_expert(extra))
    fails(ConfigError, "capacity 1", "2 experts: e0, e1", action=lambda: routed(llama(), pool, capacity=1))
    single = {"router": "single", "expert": "e0", "top_k": 1, "capacity": 4}
    fails(ConfigError, "'single'", "leave capacity out", action=lambda: routed(llama(), pool, **single))


def test_nothing_changes_under_a_watcher(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=3)
    model = routed(llama(), pool, capacity=4)
    extra = expert(tmp_path, 3)
    ids = token_ids(1, 4).tolist()
    for block in (model.trace(), model.without(["e0"]), model.prompts(ids, [["e0"]])):
        with block, pytest.raises(RuntimeError, match="cannot change inside"):
            model.add_expert(extra)
    assert model.slots.names == ["e0", "e1", "e2", ""]
    model.add_expert(extra)


def test_recordings_have_no_empty_columns(tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path, num_experts=2), capacity=3)
    nothing: Any = None
    action = lambda: record_tasks(model, nothing, [], nothing, nothing, tmp_path / "out")  # noqa: E731
    fails(RouterError, "2 experts in 3 slots", "without a capacity", action=action)
    assert not (tmp_path / "out").exists()


def test_a_pool_with_one_more_is_the_pool_it_was_added_to(tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path, num_experts=2)
    more = pool.with_expert(expert(tmp_path, 2))
    assert Pool.open(pool.folder).names == pool.names == ("e0", "e1")
    assert more.names == ("e0", "e1", "e2") and not more.check()
    pool.add(tmp_path / "e2")
    assert more.fingerprint == pool.fingerprint
