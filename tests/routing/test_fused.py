"""Layers of one input in the launches of one: what each of them gives alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checks import assert_close
from helpers.data import token_ids
from helpers.models import llama, t5
from helpers.pools import make_pool
from phatgoose import kernels
from phatgoose.kernels import KernelOptions, Layer, Rule
from phatgoose.kernels.operators import pack
from phatgoose.kernels.prototypes import split
from phatgoose.routing.fused import FusedGroup, group_layers
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.model import RoutedModel
from phatgoose.routing.state import CallState

TOKENS, EXPERTS, RANK, INPUTS = 5, 7, 8, 24


def models(factory: Any, folder: Path, **options: Any) -> tuple[RoutedModel, RoutedModel]:
    """One whose layers share their inputs, and one whose do not."""
    pool = make_pool(factory, folder)
    options = {"kernel_options": KernelOptions(share_input=False), **options}
    shared, alone = (RoutedModel.from_pool(factory(), pool, backend="triton", **options) for _ in range(2))
    group_layers(shared.routed_linears().values())
    return shared, alone


def groups(model: RoutedModel) -> dict[str, list[str]]:
    found: dict[FusedGroup, list[str]] = {}
    for site, linear in model.routed_linears().items():
        if linear.group is not None and len(linear.group.linears) > 1:
            found.setdefault(linear.group, []).append(site)
    return {sites[0].rpartition(".")[0]: [site.rpartition(".")[2] for site in sites] for sites in found.values()}


def held(model: RoutedModel) -> bool:
    return any(linear.group is not None and linear.group._held for linear in model.routed_linears().values())


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of layers at each computation of several."""
    found: list[int] = []
    compute = FusedGroup._compute

    def counted(self: FusedGroup, x: torch.Tensor, call: CallState) -> Any:
        result = compute(self, x, call)
        found.extend([] if result is None or len(self.linears) == 1 else [len(self.linears)])
        return result

    monkeypatch.setattr(FusedGroup, "_compute", counted)
    return found


def random_layer(width: int, dtype: torch.dtype) -> Layer:
    factors = torch.randn(EXPERTS, RANK, INPUTS).to(dtype), torch.randn(EXPERTS, RANK, width).to(dtype)
    return Layer(*factors, *split(torch.randn(EXPERTS, INPUTS) / INPUTS**0.5, dtype), torch.randn(1, EXPERTS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_is_sound(dtype: torch.dtype) -> None:
    widths, rule = (20, 12, 32), Rule(2, 1e-5, 1.0)
    x_NI = torch.randn(TOKENS, INPUTS).to(dtype)
    ys = [torch.randn(TOKENS, width).to(dtype) for width in widths]
    layers = [random_layer(width, dtype) for width in widths]
    alone = [y.clone() for y in ys]
    packed = pack(layers, rule, KernelOptions())
    torch.library.opcheck(torch.ops.phatgoose.route_and_add_.default, (ys, x_NI, *packed))
    routing = kernels.route_and_add_(ys, x_NI, layers, rule)
    for g, y in enumerate(alone):
        choice = kernels.route_and_add_([y], x_NI, [layers[g]], rule).layer(0)
        for found, expected in zip((ys[g], *routing.layer(g)), (y, *choice), strict=True):
            assert torch.equal(found, expected)


def test_the_operator_with_the_base_layers_is_both() -> None:
    bases = [torch.nn.Linear(INPUTS, width, bias=width > 12).requires_grad_(False) for width in (20, 12)]
    x_NI, rule = torch.randn(TOKENS, INPUTS), Rule(2, 1e-5, 1.0)
    layers = [random_layer(base.out_features, torch.float32) for base in bases]
    weights, biases = [base.weight for base in bases], [base.bias for base in bases]
    packed = pack(layers, rule, KernelOptions())
    torch.library.opcheck(torch.ops.phatgoose.routed_linears.default, (x_NI, weights, biases, *packed))
    found, routing = kernels.routed_linears(x_NI, list(zip(weights, biases, strict=True)), layers, rule)
    expected = [base(x_NI) for base in bases]
    expected_routing = kernels.route_and_add_(expected, x_NI, layers, rule)
    for once, again in zip((*found, *routing), (*expected, *expected_routing), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize("beside", [True, False])
def test_models_agree_however_the_base_layers_run(
    beside: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = KernelOptions(overlap_base=beside, base_last=beside, share_input=False)
    shared, alone = models(llama, tmp_path, kernel_options=options)
    assert all(linear.group.owns_bases == beside for linear in shared.routed_linears().values())
    counted = calls(monkeypatch)
    ids = token_ids(2, 7)
    with torch.no_grad():
        assert_close(shared(ids).logits, alone(ids).logits)
    assert counted == [3, 2] * 2


def test_which_layers_share(tmp_path: Path) -> None:
    found = groups(models(llama, tmp_path / "llama")[0])
    assert found == {
        f"model.layers.{i}.{module}": names
        for i in range(2)
        for module, names in (("self_attn", ["q_proj", "k_proj", "v_proj"]), ("mlp", ["gate_proj", "up_proj"]))
    }
    found = groups(models(t5, tmp_path / "t5")[0])
    assert len(found) == 8 and not any("EncDecAttention" in module for module in found)
    assert groups(models(llama, tmp_path / "arrow", router="arrow")[0]) == {}


def test_on_unless_switched_off(tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path)
    assert len(groups(RoutedModel.from_pool(llama(), pool, backend="triton"))) == 4
    off = KernelOptions(share_input=False)
    assert groups(RoutedModel.from_pool(llama(), pool, backend="triton", kernel_options=off)) == {}


@pytest.mark.parametrize("router", ["phatgoose", "phatgoose-prior"])
@pytest.mark.parametrize("factory", [llama, t5])
def test_models_and_traces_agree(factory: Any, router: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared, alone = models(factory, tmp_path, router=router)
    counted = calls(monkeypatch)
    ids = token_ids(2, 7)
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if factory is t5 else {})}
    found = []
    for model in (shared, alone):
        with torch.no_grad(), model.trace() as trace, model.without(["e1"]):
            logits = model(**inputs).logits
        found.append((logits, {site: trace.routing(site) for site in trace.sites}))
        assert not held(model)
    # the prior reads the prompt first, with the encoder alone where there is one
    assert len(counted) == {llama: 4, t5: 8}[factory] + (4 if router == "phatgoose-prior" else 0)
    assert_close(found[0][0], found[1][0])
    assert list(found[0][1]) == list(shared.routed_linears())
    for site, routing in found[1][1].items():
        assert torch.equal(found[0][1][site].expert_ids_BSK, routing.expert_ids_BSK)
        torch.testing.assert_close(found[0][1][site].weights_BSK, routing.weights_BSK)


def test_generates_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared, alone = models(llama, tmp_path)
    counted = calls(monkeypatch)
    ids = token_ids(2, 6)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 7, "do_sample": False, "eos_token_id": None}
    assert torch.equal(shared.generate(ids, **options), alone.generate(ids, **options))
    assert counted == [3, 2] * 2 * 7


def test_many_tokens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared, alone = models(llama, tmp_path)
    counted = calls(monkeypatch)
    many = token_ids(5, 20)
    with torch.no_grad():
        assert torch.equal(shared(input_ids=many).logits, alone(input_ids=many).logits)
    assert counted == [3, 2] * 2


def test_gradients_take_the_plain_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shared, alone = models(llama, tmp_path)
    counted = calls(monkeypatch)
    embeddings = torch.randn(1, 4, 32, requires_grad=True)
    gradients = [torch.autograd.grad(m(inputs_embeds=embeddings).logits.sum(), embeddings)[0] for m in (shared, alone)]
    assert_close(*gradients)
    assert counted == [] and not held(shared)


def test_every_call_gets_its_own_inputs_output(tmp_path: Path) -> None:
    shared, alone = models(llama, tmp_path)
    names = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    (q, k, v), plain = ([model.routed_linears()[name] for name in names] for model in (shared, alone))
    x, other = torch.randn(1, 3, 32), torch.randn(1, 3, 32)
    with torch.no_grad():
        for linear, g, inputs in ((q, 0, x), (k, 1, other), (v, 2, x), (q, 0, x), (q, 0, x), (k, 1, x.clone())):
            assert isinstance(linear, RoutedLinear)
            torch.testing.assert_close(linear(inputs), plain[g](inputs))
        q(x)
        x.mul_(-1)  # written into, while the others wait for their calls
        torch.testing.assert_close(k(x), plain[1](x))
    with torch.inference_mode():
        y = torch.randn(1, 3, 32)
        for linear, g in ((q, 0), (k, 1), (v, 2)):
            torch.testing.assert_close(linear(y), plain[g](y))


def test_an_expert_that_was_removed_is_gone_at_once(tmp_path: Path) -> None:
    shared, _ = models(llama, tmp_path, capacity=3)
    x, names = torch.randn(1, 3, 32), [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    with torch.no_grad():
        shared.routed_linears()[names[0]](x)  # the other two wait
        shared.remove_expert("e2")
        scratch = RoutedModel.from_pool(llama(), shared.pool).routed_linears()
        for name in names[1:]:
            assert_close(shared.routed_linears()[name](x), scratch[name](x))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_no_tokens(backend: Any, tmp_path: Path) -> None:
    """A mixture's expert that no token of a batch was sent to."""
    model = RoutedModel.from_pool(llama(), make_pool(llama, tmp_path), backend=backend)
    with torch.no_grad():
        for site, linear in model.routed_linears().items():
            width = linear.base.in_features
            assert linear(torch.randn(0, width)).shape == (0, linear.base.out_features), site
            assert linear(torch.randn(2, 0, width)).shape == (2, 0, linear.base.out_features), site


def test_compiles_as_one_graph(tmp_path: Path) -> None:
    shared, alone = models(llama, tmp_path)
    x = torch.randn(1, 3, 32)
    compiled = torch.compile(shared.model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for _ in range(2):
            assert_close(compiled(x), alone.model.model.layers[0].mlp(x))
    assert not held(shared)
