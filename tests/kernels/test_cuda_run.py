"""What runs on a GPU: few or many tokens, which operands are made ready, what is left to PyTorch. Interpreted here."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from phatgoose.kernels import KernelOptions, Layer, Routing, Rule, choose
from phatgoose.kernels.cuda import few, many, run
from phatgoose.kernels.prototypes import split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS, EXPERTS, RANK, INPUTS = 3, 11, 4, 32
RULE = Rule(2, 1e-5, 0.5)
SORTED = KernelOptions(sort_above_pairs=0)


def make_layer(outputs: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    factors = draw(EXPERTS, RANK, INPUTS) / INPUTS**0.5, draw(EXPERTS, RANK, outputs)
    prototypes = split(draw(EXPERTS, INPUTS) / INPUTS**0.5, torch.float32)
    return Layer(*(t.to(DEVICE) for t in (*factors, *prototypes, draw(1, EXPERTS))))


def make_input(tokens: int = TOKENS) -> torch.Tensor:
    return torch.randn(tokens, INPUTS, generator=torch.Generator().manual_seed(9)).to(DEVICE)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels' modules that added updates."""
    names: list[str] = []

    def spy(name: str, real: Any, *args: Any, **rest: Any) -> Any:
        names.append(name)
        return real(*args, **rest)

    for name, module in (("few", few), ("many", many)):
        for function in ("add_", "add_given_"):
            monkeypatch.setattr(module, function, partial(spy, name, getattr(module, function)))
    return names


def check(layers: list[Layer], options: KernelOptions, rule: Rule = RULE, tokens: int = TOKENS) -> None:
    """Against the PyTorch path."""
    x_NI = make_input(tokens)
    found, expected = ([x_NI.new_full((tokens, len(layer.b_ERO[0, 0])), 0.25) for layer in layers] for _ in range(2))
    routing = run.route_and_add_(found, x_NI, layers, rule, options)
    expected_routing = choose.route_and_add_(expected, x_NI, layers, rule)
    assert torch.equal(routing.expert_ids_NK, expected_routing.expert_ids_NK)
    torch.testing.assert_close(routing.weights_NK, expected_routing.weights_NK)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [KernelOptions(), SORTED], ids=["few", "many"])
@pytest.mark.parametrize("widths", [(24,), (24, 8, 40)], ids=str)
def test_the_number_of_pairs_decides(widths: tuple[int, ...], options: KernelOptions, called: list[str]) -> None:
    check([make_layer(width, g) for g, width in enumerate(widths)], options)
    assert called == ["many" if options is SORTED else "few"]


def test_sorted_from_one_pair_more_on() -> None:
    options = KernelOptions(sort_above_pairs=6)
    assert not options.sorts(3, 2) and options.sorts(7, 1) and options.sorts(4, 2)


@pytest.mark.parametrize("options", [KernelOptions(), SORTED], ids=["few", "many"])
def test_operands_with_gaps_are_made_ready(options: KernelOptions) -> None:
    layer = make_layer(24, 0)
    gaps = layer._replace(
        a_ERI=layer.a_ERI.transpose(1, 2).contiguous().transpose(1, 2),
        b_ERO=torch.cat([layer.b_ERO, layer.b_ERO], dim=2)[:, :, :24],
        bias_NE=layer.bias_NE.double(),
    )
    assert not gaps.a_ERI.is_contiguous() and not gaps.b_ERO.is_contiguous()
    x_NI = make_input()
    ys = [x_NI.new_full((TOKENS, 24), 0.25) for _ in range(2)]
    routings = [run.route_and_add_([y], x_NI, [one], RULE, options) for y, one in zip(ys, (layer, gaps), strict=True)]
    for once, again in zip((ys[0], *routings[0]), (ys[1], *routings[1]), strict=True):
        assert torch.equal(once, again)


def test_more_experts_per_token_than_kernels_unroll(called: list[str]) -> None:
    check([make_layer(24, 0)], KernelOptions(), Rule(run.MAX_TOP_K + 1, 1e-5, 1.0))
    assert called == []


def test_no_tokens(called: list[str]) -> None:
    layers = [make_layer(24, 0), make_layer(8, 1)]
    x_NI = make_input(0)
    ys = [x_NI.new_empty(0, width) for width in (24, 8)]
    weights_GNK, ids_GNK = run.route_and_add_(ys, x_NI, layers, RULE, KernelOptions())
    assert weights_GNK.shape == ids_GNK.shape == (2, 0, 2)
    assert weights_GNK.dtype == torch.float32 and ids_GNK.dtype == torch.int64
    assert called == []


def test_layers_that_cannot_share_launches_are_refused() -> None:
    layers, x_NI = [make_layer(24, g) for g in range(4)], make_input()
    ys = [x_NI.new_zeros(TOKENS, 24) for _ in layers]
    with pytest.raises(TypeError, match="up to 3 layers"):
        run.route_and_add_(ys, x_NI, layers, RULE, KernelOptions())
    with pytest.raises(TypeError, match="of one dtype"):
        run.route_and_add_([ys[0], ys[1].double()], x_NI, layers[:2], RULE, KernelOptions())
    with pytest.raises(ValueError, match="differ"):
        run.route_and_add_(ys[:2], x_NI, [layers[0], layers[1]._replace(bias_NE=None)], RULE, KernelOptions())
    with pytest.raises(ValueError, match="gaps"):
        run.route_and_add_([x_NI.new_zeros(24, TOKENS).T], x_NI, layers[:1], RULE, KernelOptions())
    assert all((y_NO == 0).all() for y_NO in ys)


@pytest.mark.slow
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("options", [KernelOptions(), SORTED], ids=["few", "many"])
def test_base_layers_included(options: KernelOptions, with_bias: bool, called: list[str]) -> None:
    """Many tokens without a bias: the base layers come last; else first, where no graph is captured."""
    layers, x_NI = [make_layer(24, 0), make_layer(8, 1)], make_input()
    weights = [torch.randn(width, INPUTS).to(DEVICE) for width in (24, 8)]
    biases = [torch.randn(width).to(DEVICE) if with_bias else None for width in (24, 8)]
    bases = list(zip(weights, biases, strict=True))
    ys, routing = run.routed_linears(x_NI, bases, layers, RULE, options)
    expected = [torch.nn.functional.linear(x_NI, *base) for base in bases]
    expected_routing = run.route_and_add_(expected, x_NI, layers, RULE, options)
    torch.testing.assert_close(ys, expected)
    assert all(torch.equal(one, other) for one, other in zip(routing, expected_routing, strict=True))
    assert called == ["many" if options is SORTED else "few"] * 2


@pytest.mark.parametrize(("tokens", "kernels"), [(3, "few"), (65, "many")])
def test_given_routing(tokens: int, kernels: str, called: list[str]) -> None:
    layer, x_NI = make_layer(24, 0), make_input(tokens)
    ids_NK = torch.stack([torch.arange(tokens) % EXPERTS, (torch.arange(tokens) + 3) % EXPERTS], dim=1).to(DEVICE)
    routing = Routing(torch.rand(tokens, 2).to(DEVICE), ids_NK)
    y_NO = x_NI.new_full((tokens, 24), 0.25)
    run.add_loras_(y_NO, x_NI, layer.a_ERI, layer.b_ERO, routing)
    expected_NO = 0.25 + choose.mix_loras(x_NI, layer.a_ERI, layer.b_ERO, routing)
    torch.testing.assert_close(y_NO, expected_NO)
    assert called == [kernels]
