"""Routing and mixing in Numba's loops: what the router's own code and `reference` give."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checks import assert_close
from helpers.data import token_ids
from helpers.models import llama
from helpers.pools import make_pool
from phatgoose.kernels import KernelOptions, Layer, Routing, Rule, cpu, reference
from phatgoose.kernels.prototypes import split
from phatgoose.routing.model import RoutedModel

TOKENS, EXPERTS, INPUTS, OUTPUTS, EPS = 70, 21, 45, 30, 1e-5


def layer(top_k: int, rank: int = 6, mean: float = 0.5) -> tuple[torch.Tensor, ...]:
    """(x_NI, a_ERI, b_ERO, prototypes_EI); neither width, nor rank, is a multiple of a vector's lanes."""
    torch.manual_seed(top_k + rank)
    gates_EI = torch.nn.functional.layer_norm(torch.randn(EXPERTS, INPUTS), (INPUTS,), eps=EPS)
    factors = torch.randn(EXPERTS, rank, INPUTS), torch.randn(EXPERTS, rank, OUTPUTS)
    return torch.randn(TOKENS, INPUTS) + mean, *factors, gates_EI / math.sqrt(INPUTS)


def arrays(a_ERI: torch.Tensor, b_ERO: torch.Tensor, prototypes_EI: torch.Tensor, bias_NE: torch.Tensor) -> Any:
    """What the loops read of a layer."""
    return cpu.LayerArrays.of(Layer(a_ERI, b_ERO, *split(prototypes_EI, torch.float32), bias_NE))


def scores(x_NI: torch.Tensor, prototypes_EI: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x_NI.double(), (INPUTS,), eps=EPS) @ prototypes_EI.double().T


@pytest.mark.parametrize("at_once", [1, TOKENS])
@pytest.mark.parametrize("rows", [1, TOKENS])
@pytest.mark.parametrize("mean", [0.5, 300.0])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_route_and_add(top_k: int, mean: float, rows: int, at_once: int) -> None:
    x_NI, a_ERI, b_ERO, prototypes_EI = layer(top_k, mean=mean)
    bias_NE = torch.randn(rows, EXPERTS)
    bias_NE[:, 3] = -math.inf
    y_NO = torch.full((TOKENS, OUTPUTS), 0.25)
    found = []
    for n in range(0, TOKENS, at_once):
        tokens = slice(n, n + at_once)
        whole = arrays(a_ERI, b_ERO, prototypes_EI, bias_NE if rows == 1 else bias_NE[tokens])
        found.append(cpu.route_and_add_([y_NO[tokens]], x_NI[tokens], [whole], Rule(top_k, EPS, 0.5)).layer(0))
    weights_NK, ids_NK = (torch.cat(parts) for parts in zip(*found, strict=True))
    top_NK, expected_NK = (scores(x_NI, prototypes_EI) + bias_NE).topk(top_k)
    # a mean of 300 takes as much of fp32's bits
    tolerance = max(1.0, mean) * 1e-5
    gaps_N = (scores(x_NI, prototypes_EI) + bias_NE).topk(top_k + 1).values.diff(dim=1).abs().min(dim=1).values
    clear_N = gaps_N > 2 * tolerance
    assert clear_N.double().mean() > 0.8
    assert torch.equal(ids_NK[clear_N], expected_NK[clear_N])
    torch.testing.assert_close(
        weights_NK[clear_N].double(), (top_NK / 0.5).softmax(1)[clear_N], rtol=0, atol=4 * tolerance
    )
    expected = 0.25 + reference.mix_loras(x_NI, a_ERI, b_ERO, Routing(weights_NK, ids_NK))
    torch.testing.assert_close(y_NO, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_number_of_threads_stays() -> None:
    """Numba starts its threads once, so in a process of its own."""
    program = """
import torch
from phatgoose import kernels
for number in (1, 2):
    torch.set_num_threads(number)
    factors = torch.randn(2, 40, 4, 64)
    routing = kernels.Routing(torch.ones(9, 2), torch.zeros(9, 2, dtype=int))
    kernels.mix_loras(torch.randn(9, 64), *factors, routing, backend="numba")
    print(torch.get_num_threads())
"""
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
    assert found.split() == ["1", "2"]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("outputs", [30, 1100])
def test_threads_share_the_output_by_columns_and_tokens(outputs: int, threads: int) -> None:
    """30 columns are too few to be shared, of 1,100 each of two threads has 550; rank 13 is 8 and a rest."""
    x_NI, a_ERI = layer(2, rank=13)[:2]
    b_ERO = torch.randn(EXPERTS, 13, outputs)
    weights_NK, ids_NK = torch.rand(TOKENS, 2), torch.rand(TOKENS, EXPERTS).topk(2).indices
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = cpu.mix_loras(x_NI, a_ERI, b_ERO, Routing(weights_NK, ids_NK))
    finally:
        torch.set_num_threads(before)
    expected = reference.mix_loras(x_NI, a_ERI, b_ERO, Routing(weights_NK, ids_NK))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_same_bits_twice() -> None:
    x_NI, a_ERI, b_ERO, prototypes_EI = layer(2)
    found = []
    for _ in range(2):
        y_NO = torch.zeros(TOKENS, OUTPUTS)
        whole = arrays(a_ERI, b_ERO, prototypes_EI, torch.zeros(1, EXPERTS))
        found.append((y_NO, *cpu.route_and_add_([y_NO], x_NI, [whole], Rule(2, EPS, 1.0))))
    for once, again in zip(*found, strict=True):
        assert torch.equal(once, again)


def test_the_lower_of_equal_scores_wins_and_nan_is_the_largest() -> None:
    x_NI, a_ERI, b_ERO, prototypes_EI = layer(2)
    bias_NE = torch.zeros(1, EXPERTS)
    bias_NE[0, 0] = -1.0

    def chosen(top_k: int = 3) -> tuple[list[int], list[float]]:
        found = []
        for tokens in (TOKENS, 1):
            y_NO = torch.zeros(tokens, OUTPUTS)
            whole = arrays(a_ERI, b_ERO, torch.zeros_like(prototypes_EI), bias_NE)
            rule = Rule(top_k, EPS, 1.0)
            weights_NK, ids_NK = cpu.route_and_add_([y_NO], x_NI[:tokens], [whole], rule).layer(0)
            found.append((ids_NK[0].tolist(), pytest.approx(weights_NK[0].tolist())))
        assert found[0][0] == found[1][0] and found[0][1].expected == found[1][1]
        return found[0][0], found[0][1].expected

    assert chosen() == ([1, 2, 3], pytest.approx([1 / 3] * 3))
    bias_NE[0, 7] = math.nan
    assert chosen()[0] == [7, 1, 2]
    bias_NE[0, :] = -math.inf
    assert chosen() == ([0, 1, 2], [0.0] * 3)
    bias_NE[0, 4] = 0.0
    assert chosen(1) == ([4], [1.0])


def test_layers_of_one_input_get_what_each_gets_alone() -> None:
    x_NI = torch.randn(1, INPUTS)
    widths = (OUTPUTS, 7, 64)
    layers = []
    for width in widths:
        factors = torch.randn(EXPERTS, 6, INPUTS), torch.randn(EXPERTS, 6, width)
        layers.append(arrays(*factors, torch.randn(EXPERTS, INPUTS) / INPUTS**0.5, torch.randn(1, EXPERTS)))
    together, rule = [torch.full((1, width), 0.25) for width in widths], Rule(2, EPS, 0.5)
    weights_GNK, ids_GNK = cpu.route_and_add_(together, x_NI, layers, rule)
    assert len(set(map(str, ids_GNK.tolist()))) > 1
    for g, one in enumerate(layers):
        y_NO = torch.full((1, widths[g]), 0.25)
        alone = cpu.route_and_add_([y_NO], x_NI, [one], rule).layer(0)
        for found, expected in zip((together[g], weights_GNK[g], ids_GNK[g]), (y_NO, *alone), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("sharing", [True, False])
@pytest.mark.parametrize("router", ["phatgoose", "phatgoose-prior"])
def test_one_token_after_another(router: str, sharing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Query, key and value, gate and up share a call of the loops; or each has its own."""
    called = []
    real = cpu._route_and_add_one
    monkeypatch.setattr(cpu, "_route_and_add_one", lambda ys, *rest: called.append(len(ys)) or real(ys, *rest))
    pool = make_pool(llama, tmp_path, num_experts=12)
    ids = token_ids(1, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = []
    kernel_options = KernelOptions(share_input=sharing)
    for backend in ("numba", "reference"):
        model = RoutedModel.from_pool(llama(), pool, router=router, backend=backend, kernel_options=kernel_options)
        with model.trace() as trace, model.without(["e1"]):
            tokens = model.generate(ids, **options)
        found.append((tokens, {site: trace.routing(site) for site in trace.sites}))
    # the first of six tokens comes with the prompt
    assert called == ([3, 1, 2, 1] if sharing else [1] * 7) * 2 * 5
    assert torch.equal(found[0][0], found[1][0])
    for site, routing in found[1][1].items():
        assert torch.equal(found[0][1][site].expert_ids_BSK, routing.expert_ids_BSK)
        torch.testing.assert_close(found[0][1][site].weights_BSK, routing.weights_BSK)


@pytest.mark.parametrize("router", ["phatgoose", "phatgoose-prior", "arrow"])
def test_models_and_traces_agree(router: str, tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, num_experts=12)
    ids = token_ids(3, 14)  # more tokens than are routed one by one
    found = []
    for backend in ("reference", "numba"):
        model = RoutedModel.from_pool(llama(), pool, router=router, backend=backend)
        loops = [linear.group is not None for linear in model.routed_linears().values()]
        assert all(loops) == any(loops) == (backend == "numba" and router != "arrow")
        with torch.no_grad(), model.trace() as trace, model.without(["e1"]):
            found.append((model(ids).logits, {site: trace.routing(site) for site in trace.sites}))
    assert_close(found[1][0], found[0][0])
    for site, routing in found[0][1].items():
        assert torch.equal(found[1][1][site].expert_ids_BSK, routing.expert_ids_BSK)
        torch.testing.assert_close(found[1][1][site].weights_BSK, routing.weights_BSK)


def test_gradients_take_the_other_way(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, num_experts=12)
    x = torch.randn(1, 40, 32, requires_grad=True)
    gradients = []
    for backend in ("reference", "numba"):
        model = RoutedModel.from_pool(llama(), pool, backend=backend)
        gradients.append(torch.autograd.grad(model(inputs_embeds=x).logits.square().sum(), x)[0])
    assert_close(*gradients)


def test_a_copy_reads_its_own_numbers(tmp_path: Path) -> None:
    model = RoutedModel.from_pool(llama(), make_pool(llama, tmp_path, num_experts=12), backend="numba")
    linear = model.routed_linears()["model.layers.0.self_attn.q_proj"]
    x = torch.randn(20, 32)
    with torch.no_grad():
        expected = linear(x)
        copied = copy.deepcopy(linear)
        copied.b_ERO.zero_()
        assert_close(copied(x), linear.base(x))
        assert torch.equal(linear(x), expected)


def test_a_model_that_was_converted_is_read_anew(tmp_path: Path) -> None:
    model = RoutedModel.from_pool(llama(), make_pool(llama, tmp_path, num_experts=12), backend="numba")
    ids = token_ids(3, 14)
    with torch.no_grad():
        expected = model(ids).logits
        for linear in model.routed_linears().values():
            linear.b_ERO = torch.zeros_like(linear.b_ERO)
        model.float()
        without = llama()(ids).logits
        assert not torch.allclose(expected, without)
        assert_close(model(ids).logits, without)


def test_an_expert_that_came_later_is_routed_to(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, num_experts=12)
    model = RoutedModel.from_pool(llama(), pool, backend="numba", capacity=12)
    ids = token_ids(3, 14)
    expert = pool.expert("e5")
    with torch.no_grad():
        model(ids)
    model.remove_expert("e5")
    model.add_expert(expert)
    with torch.no_grad():
        assert_close(model(ids[:1, :1]).logits, RoutedModel.from_pool(llama(), pool)(ids[:1, :1]).logits)
        assert_close(model(ids).logits, RoutedModel.from_pool(llama(), pool, backend="reference")(ids).logits)
