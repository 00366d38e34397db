"""What every router promises."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
from peft import PeftModel

from helpers.checks import assert_close, fails
from helpers.data import model_inputs
from helpers.models import MODELS, gpt2, llama
from helpers.pools import fill_pool, make_adapter, make_expert
from helpers.routing import AMONG_MANY, complete, logits, make_pool, routed
from phatgoose.config import RouterConfig
from phatgoose.errors import ConfigError, PoolError, RouterError
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.experts.stack import SiteStack
from phatgoose.routers import router_class
from phatgoose.routers.base import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.model import RoutedModel

# a decoder's sites see no token of the prompt
PAIRS = [(router, kind) for router in AMONG_MANY for kind in MODELS if (router, kind) != ("phatgoose-sequence", "t5")]
TOKEN_LEVEL = [name for name in AMONG_MANY if not router_class(name).reads_prompts]


@pytest.mark.parametrize(("router", "kind"), PAIRS)
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


def test_a_router_lies_where_its_stack_does() -> None:
    """Also inside `with torch.device(...)`, where others build a whole model."""
    stack = SiteStack(
        a_ERI=torch.randn(3, 2, 8),
        b_ERO=torch.randn(3, 2, 5),
        gates_EI=torch.randn(3, 8),
        present_E=torch.tensor([True, False, True]),
    )
    with torch.device("meta"):
        router = Phatgoose(stack, RouterConfig())
    assert router.absent_E.tolist() == [0.0, -math.inf, 0.0]


@pytest.mark.parametrize("router", AMONG_MANY)
def test_the_order_of_experts_does_not_matter(router: str, tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    model = routed(llama(), pool, router=router)
    expected = logits(model)
    assert_close(logits(routed(model.unwrap(), pool.subset(pool.names[::-1]), router=router)), expected)


@pytest.mark.parametrize(("router", "kind"), PAIRS)
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
def test_prompts_of_one_batch_can_lack_different_experts(router: str, tmp_path: Path) -> None:
    model = routed(llama(), make_pool("llama", tmp_path), router=router)
    unmasked, ids = logits(model), model_inputs(model.model)["input_ids"]
    expected = []
    for b, names in enumerate((["e2"], ["e0", "e3"])):
        with model.without(names):
            expected.append(logits(model, input_ids=ids[b : b + 1]))
    with model.prompts(ids.tolist(), without=[["e2"], ["e0", "e3"]]), model.trace() as trace:
        found = logits(model, input_ids=ids)
    assert_close(found, torch.cat(expected))
    for site in trace.sites:
        weights_BSE = trace.weights(site)
        assert weights_BSE[0, :, 2].max() == weights_BSE[1, :, [0, 3]].max() == 0 < weights_BSE[0, :, [0, 1, 3]].sum()
    assert torch.equal(logits(model), unmasked)
    # both kinds of masks add up
    with model.without(["e3"]), model.prompts(ids.tolist(), without=[["e2"], ["e0"]]):
        assert_close(logits(model, input_ids=ids)[1:], expected[1])


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
    fails(RouterError, "e0, e1", action=lambda: model.prompts([[5], [6]], [[], ["e1", "e0"]]).__enter__())
    fails(PoolError, "'e7'", action=lambda: model.prompts([[5]], [["e7"]]).__enter__())
    with model.without(["e0"]):
        fails(RouterError, "e0, e1", action=lambda: model.prompts([[5]], [["e1"]]).__enter__())
    logits(model)  # and nothing is left masked


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


def test_unknown_options_and_routers(tmp_path: Path) -> None:
    pool = make_pool("gpt2", tmp_path, num_experts=2)
    fails(ConfigError, "'warmth'", "temperature", action=lambda: routed(gpt2(), pool, warmth=2))
    fails(RouterError, "'nearest'", "arrow", action=lambda: routed(gpt2(), pool, router="nearest"))
    fails(RouterError, "top_k 3", action=lambda: routed(gpt2(), pool, router="arrow", top_k=3))
    assert Expert(tmp_path / "e0").brings("gate")


class FirstTwo(Router):
    """A router of one's own: whoever comes first in the pool."""

    def scores(self, x_NI: torch.Tensor) -> torch.Tensor:
        return -torch.arange(float(len(self.absent_E)), device=x_NI.device).expand(len(x_NI), -1)


def test_a_router_of_ones_own(tmp_path: Path) -> None:
    """A class, or its name as MODULE:CLASS, as on the command line."""
    pool = make_pool("llama", tmp_path)
    model = RoutedModel.from_pool(llama(), pool, router=FirstTwo)
    with model.trace() as trace:
        expected = logits(model)
    assert all(set(trace.routing(site).expert_ids_BSK.unique().tolist()) == {0, 1} for site in trace.sites)
    name = model.router_config.router
    assert name == f"{FirstTwo.__module__}:FirstTwo"
    fails(RouterError, name, action=lambda: router_class(name))  # names in files import nothing
    with mock.patch.dict(sys.modules, {"my_routers": types.SimpleNamespace(FirstTwo=FirstTwo, other=3)}):
        assert torch.equal(logits(RoutedModel.from_pool(llama(), pool, router="my_routers:FirstTwo")), expected)
        for wrong in ("my_routers:other", "my_routers:missing", "no_such_module:Router", "no-such-router"):
            fails(
                RouterError,
                wrong,
                "MODULE:CLASS",
                action=lambda w=wrong: RoutedModel.from_pool(llama(), pool, router=w),
            )
