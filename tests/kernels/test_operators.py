"""The registered operators and the layers that use them. On the CPU they are the PyTorch backends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import llama, t5
from helpers.pools import make_pool
from phatgoose import kernels
from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import DEFAULT_OPTIONS, KernelOptions, Layer, Routing, Rule, choose
from phatgoose.kernels.operators import pack, unpack
from phatgoose.kernels.prototypes import join, rows_of, split
from phatgoose.routers import ROUTERS, router_class
from phatgoose.routers.base import Router
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.model import RoutedModel
from phatgoose.routing.state import CallState

TOKENS, EXPERTS, RANK, INPUTS, OUTPUTS = 9, 5, 8, 24, 20
RULE = Rule(2, 1e-5, 1.0)


def make_linear(
    backend: kernels.Backend, dtype: torch.dtype = torch.float32, options: KernelOptions = DEFAULT_OPTIONS
) -> RoutedLinear:
    torch.manual_seed(0)
    stack = SiteStack(
        a_ERI=torch.randn(EXPERTS, RANK, INPUTS).to(dtype),
        b_ERO=torch.randn(EXPERTS, RANK, OUTPUTS).to(dtype),
        gates_EI=torch.randn(EXPERTS, INPUTS),
        present_E=torch.tensor([True, True, False, True, True]),
    )
    base = torch.nn.Linear(INPUTS, OUTPUTS).to(dtype).requires_grad_(False)
    return RoutedLinear(base, stack, Phatgoose(stack, RouterConfig(top_k=2)), backend, options)


def arguments(gradients: bool = False) -> tuple[Any, ...]:
    linear = make_linear("triton")
    x_NI = torch.randn(TOKENS, INPUTS).requires_grad_(gradients)
    return x_NI, linear.a_ERI.requires_grad_(gradients), linear.b_ERO.requires_grad_(gradients)


def choice(gradients: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(TOKENS, 2).requires_grad_(gradients), torch.randint(EXPERTS, (TOKENS, 2))


def test_mix_loras_is_a_sound_operator() -> None:
    torch.library.opcheck(torch.ops.phatgoose.mix_loras.default, (*arguments(True), *choice(True)))


def test_operators_that_add_are_sound() -> None:
    y_NO = torch.randn(TOKENS, OUTPUTS)
    torch.library.opcheck(torch.ops.phatgoose.add_loras_.default, (y_NO, *arguments(), *choice()))
    x_NI, *factors = arguments()
    prototypes = split(torch.randn(EXPERTS, INPUTS), torch.float32)
    for bias_NE in (None, torch.randn(1, EXPERTS)):
        packed = pack([Layer(*factors, *prototypes, bias_NE)], RULE, KernelOptions())
        torch.library.opcheck(torch.ops.phatgoose.route_and_add_.default, ([y_NO], x_NI, *packed))


def test_routed_linear_is_both() -> None:
    x_NI, *factors = arguments()
    base = torch.nn.Linear(INPUTS, OUTPUTS).requires_grad_(False)
    layer = Layer(*factors, *split(torch.randn(EXPERTS, INPUTS), torch.float32), torch.randn(1, EXPERTS))
    packed = pack([layer], RULE, KernelOptions())
    torch.library.opcheck(torch.ops.phatgoose.routed_linears.default, (x_NI, [base.weight], [base.bias], *packed))
    y_NO = base(x_NI)
    routing = kernels.route_and_add_([y_NO], x_NI, [layer], RULE)
    (found_NO,), found = kernels.routed_linears(x_NI, [(base.weight, base.bias)], [layer], RULE)
    for once, again in zip((found_NO, *found), (y_NO, *routing), strict=True):
        assert torch.equal(once, again)


def test_every_switch_reaches_the_kernels() -> None:
    """Switches travel through the operators as numbers: what is packed is what is unpacked."""
    layer = Layer(*arguments()[1:], *split(torch.randn(EXPERTS, INPUTS), torch.float32), None)
    options = KernelOptions(overlap_base=False, base_last=False, pdl_max_tokens=3, sort_above_pairs=7)
    for given in (options, KernelOptions()):
        layers, rule, found = unpack(pack([layer, layer], RULE, given))
        assert found == given and rule == RULE
        assert all(one is other for got in layers for one, other in zip(got, layer, strict=True))


def test_prototypes_that_were_joined_are_read_where_they_lie() -> None:
    gates = [split(torch.randn(EXPERTS, INPUTS), torch.bfloat16).gates_HPI for _ in range(3)]
    expected_VI = torch.cat([gates_HPI.flatten(0, 1) for gates_HPI in gates])
    joined = join(gates)
    assert all(torch.equal(found, gates_HPI) for found, gates_HPI in zip(joined, gates, strict=True))
    for found, copied in ((joined, False), (gates, True), (joined[:1], False), (joined[1:], False)):
        rows_VI = rows_of(found)
        assert torch.equal(rows_VI, torch.cat([gates_HPI.flatten(0, 1) for gates_HPI in found]))
        assert (rows_VI.data_ptr() != found[0].data_ptr()) == copied
    assert torch.equal(rows_of(joined), expected_VI)
    assert torch.equal(rows_of([joined[1], joined[0]]), expected_VI.view(3, -1, INPUTS)[[1, 0]].flatten(0, 1))


def test_prototypes_that_kernels_would_read_wrongly_are_refused() -> None:
    pytest.importorskip("triton")
    from phatgoose.kernels.cuda.run import checked

    gates_HPI, gate_sums_E = split(torch.randn(EXPERTS, INPUTS), torch.bfloat16)
    x_NI, a_ERI = (torch.randn(shape).bfloat16() for shape in ((3, INPUTS), (EXPERTS, 4, INPUTS)))
    layer = Layer(a_ERI, a_ERI, gates_HPI, gate_sums_E, None)
    assert checked(x_NI, [layer], []) == [layer]
    with pytest.raises(ValueError, match="gaps"):
        checked(x_NI, [layer._replace(gates_HPI=gates_HPI[:, :EXPERTS])], [])
    with pytest.raises(TypeError, match="float32"):
        checked(x_NI, [layer._replace(gates_HPI=gates_HPI.float())], [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_prototypes_add_up(dtype: torch.dtype) -> None:
    prototypes_EI = torch.randn(EXPERTS, INPUTS) / INPUTS**0.5
    gates_HPI, gate_sums_E = split(prototypes_EI, dtype)
    found_EI = gates_HPI[:, :EXPERTS].double().sum(0)
    bits = {torch.float32: 24, torch.bfloat16: 16, torch.float16: 20}[dtype]
    assert ((found_EI - prototypes_EI).abs() <= prototypes_EI.abs().max() * 2.0**-bits).all()
    assert len(gates_HPI) == (1 if dtype == torch.float32 else 2) and gates_HPI.dtype == dtype
    assert gates_HPI.shape[1] == 16  # 16 bytes at a time
    assert gates_HPI[0, EXPERTS].eq(1).all() and gates_HPI[:, EXPERTS + 1 :].eq(0).all()
    assert gates_HPI[1:, EXPERTS].eq(0).all()
    assert split(torch.randn(16, INPUTS), dtype).gates_HPI.shape[1] == 32
    torch.testing.assert_close(gate_sums_E.double(), found_EI.sum(1), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_fused_layer_is_the_layer() -> None:
    """One operator in place of router and mixing: same output, same record, also compiled as one graph."""
    plain, fused = make_linear("reference"), make_linear("triton")
    assert fused.group is not None and plain.group is None
    x = torch.randn(2, 3, INPUTS)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for layer in (fused, compiled):
            torch.testing.assert_close(layer(x), plain(x))
        for mask_1E in (torch.tensor([[0.0, -torch.inf, 0.0, 0.0, 0.0]]), torch.full((1, EXPERTS), -torch.inf)):
            call = CallState(mask_1E=mask_1E)
            with plain.state.during(call), fused.state.during(call):
                torch.testing.assert_close(fused(x), plain(x))
                torch.testing.assert_close(compiled(x), plain(x))
        with fused.state.during(call):
            torch.testing.assert_close(fused(x), plain.base(x))  # nobody was left


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "gather", "grouped", "dense", "triton"])
def test_compiles_as_one_graph(backend: kernels.Backend) -> None:
    # torch 2.13 compiles grouped_mm in bf16 only
    linear, x = make_linear(backend, torch.bfloat16), torch.randn(2, 3, INPUTS, dtype=torch.bfloat16)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(x))


def test_auto_is_triton_on_gpus_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, dtypes = torch.device("cuda"), (torch.float32, torch.bfloat16, torch.float16)
    monkeypatch.setattr("torch.version.cuda", "13.0")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(choose, "find_spec", lambda name: name == "triton")
    assert all(kernels.runs_triton(gpu, dtype) for dtype in dtypes)
    assert not kernels.runs_triton(gpu, torch.float64)
    assert not kernels.runs_triton(torch.device("cpu"), torch.bfloat16)
    assert make_linear("auto").backend == "auto"  # on a CPU
    monkeypatch.setattr(RoutedLinear, "_base_device", lambda self: gpu)
    assert make_linear("auto").group is not None and make_linear("auto", torch.bfloat16).backend == "triton"
    assert make_linear("grouped").backend == "grouped"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    assert make_linear("auto").backend == "auto"


@pytest.mark.slow
@pytest.mark.parametrize("inside", [True, False])
def test_base_layer_inside_the_operator(inside: bool) -> None:
    plain = make_linear("reference")
    beside = make_linear("triton", options=KernelOptions(overlap_base=inside, base_last=inside))
    assert beside.group is not None and beside.group.owns_bases == inside
    x = torch.randn(2, 3, INPUTS)
    compiled = torch.compile(beside, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for layer in (beside, compiled):
            torch.testing.assert_close(layer(x), plain(x))
    x.requires_grad_()
    assert beside(x).requires_grad  # the other way


def test_gradients_take_the_other_way() -> None:
    plain, fused = make_linear("reference"), make_linear("triton")
    x = torch.randn(2, 3, INPUTS, requires_grad=True)
    found, expected = (torch.autograd.grad(layer(x).square().sum(), x)[0] for layer in (fused, plain))
    error = (found - expected).norm() / expected.norm()
    assert error <= 32 * torch.finfo(torch.float32).eps
    y_NO = torch.zeros(6, OUTPUTS)
    with pytest.raises(RuntimeError, match="no gradient"):
        kernels.add_loras_(y_NO, x.view(-1, INPUTS), fused.a_ERI, fused.b_ERO, Routing(*(t[:6] for t in choice())))
    assert (y_NO == 0).all()


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged", "merged-parameters"])
@pytest.mark.parametrize("factory", [llama, t5])
def test_models_and_traces_agree(factory: Any, router: str, tmp_path: Path) -> None:
    pool = make_pool(factory, tmp_path)
    ids = torch.randint(3, 90, (2, 7))
    inputs = {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if factory is t5 else {})}
    found = []
    for backend in ("reference", "triton"):
        model = RoutedModel.from_pool(factory(), pool, router=router, backend=backend)
        with torch.no_grad(), model.trace() as trace:
            found.append((model(**inputs).logits, [record.routing() for record in trace.records.values()]))
    torch.testing.assert_close(found[1][0], found[0][0])
    for once, again in zip(found[0][1], found[1][1], strict=True):
        assert once is not None and again is not None
        assert torch.equal(once.expert_ids_BSK, again.expert_ids_BSK)
        torch.testing.assert_close(once.weights_BSK, again.weights_BSK)


def test_routers_that_standardise_have_the_rule_of_the_kernels() -> None:
    names = [name for name in ROUTERS if router_class(name).standardises]
    assert {"phatgoose", "average-activation"} <= set(names)
    for name in names:
        found = router_class(name)
        assert found.scores is Phatgoose.scores, name
        assert found.choose is Router.choose and found.weights is Router.weights, name
        assert found.mix is Router.mix, name
