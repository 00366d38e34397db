"""The Triton kernels against a loop in fp64.

On a GPU the compiled kernels run. Without one Triton's interpreter runs them, which covers indexing, masks, the order
of sums and the choice, in all dtypes. It does not cover what the compiler makes of them (test_cuda_compile.py
compiles them for a GPU, but runs nothing) and differs in two things: products of bf16 matrices are widened to fp32
first (it would multiply their bits), and casts to bf16 cut digits off instead of rounding.

y is compared for the experts and weights that the kernel chose; the choice is compared by itself, except where the
scores in fp64 are so close that rounding may decide. Whatever a launcher allocates is poisoned with NaN or large
integers first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
from helpers.kernels import Shape
from phatgoose.kernels import Layer as KernelLayer
from phatgoose.kernels import Routing, Rule
from phatgoose.kernels.cuda import few, many, settings
from phatgoose.kernels.cuda.sort import narrow_ids, sort_pairs
from phatgoose.kernels.prototypes import split

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# y is rounded once per pass over it (3 for top-2) and h once; see above for what the interpreter adds in bf16
EPS_UNITS = {torch.float32: 8.0, torch.bfloat16: 3.0 if DEVICE == "cuda" else 6.0, torch.float16: 3.0}
# Scores have a spread of 1. hi + lo keeps 24, 16 or 22 bits of a prototype; errors of I terms add like a random walk.
SCORE_ERROR = {torch.float32: 4e-6, torch.bfloat16: 2**-15, torch.float16: 4e-6}


SHAPES = [
    Shape(tokens=1, top_k=1, experts=1, rank=4, inputs=5, outputs=3),
    Shape(tokens=1, top_k=2, experts=2, rank=8, inputs=16, outputs=24),
]
# the interpreter takes seconds for each
LARGER_SHAPES = [
    Shape(tokens=3, top_k=2, experts=166, rank=16, inputs=1030, outputs=40),
    Shape(tokens=17, top_k=3, experts=166, rank=4, inputs=72, outputs=130),
    Shape(tokens=17, top_k=8, experts=8, rank=24, inputs=33, outputs=11),
    Shape(tokens=257, top_k=2, experts=33, rank=16, inputs=40, outputs=56),
]
LARGE = Shape(tokens=257, top_k=1, experts=2, rank=24, inputs=136, outputs=17)
MIDDLE = Shape(tokens=21, top_k=2, experts=33, rank=16, inputs=96, outputs=80)
KERNELS = ["few", "many"]


class Layer(NamedTuple):
    x_NI: torch.Tensor
    a_ERI: torch.Tensor
    b_ERO: torch.Tensor
    prototypes_EI: torch.Tensor


class Asked(NamedTuple):
    """How a layer is routed: the kernels' own view of it, and the rule."""

    layer: KernelLayer
    rule: Rule


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN and large integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)  # the oracle may use cuBLAS
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


def make_layer(shape: Shape, dtype: torch.dtype, mean: float = 0.5) -> Layer:
    torch.manual_seed(sum(shape))
    x_NI = (torch.randn(shape.tokens, shape.inputs) + mean).to(dtype)
    a_ERI = (torch.randn(shape.experts, shape.rank, shape.inputs) / shape.inputs**0.5).to(dtype)
    b_ERO = (torch.randn(shape.experts, shape.rank, shape.outputs) / shape.rank**0.5).to(dtype)
    gates_EI = torch.nn.functional.layer_norm(torch.randn(shape.experts, shape.inputs), (shape.inputs,), eps=EPS)
    return Layer(*(t.to(DEVICE) for t in (x_NI, a_ERI, b_ERO, gates_EI / math.sqrt(shape.inputs))))


def ask(layer: Layer, top_k: int, bias_NE: torch.Tensor | None = None, temperature: float = 1.0) -> Asked:
    prototypes = split(layer.prototypes_EI, layer.x_NI.dtype)
    return Asked(KernelLayer(layer.a_ERI, layer.b_ERO, *prototypes, bias_NE), Rule(top_k, EPS, temperature))


def chosen_settings(kernel: str, layer: Layer, top_k: int, **changes: Any) -> Any:
    (num_tokens, inputs), num_experts = layer.x_NI.shape, len(layer.a_ERI)
    if kernel == "few":
        return dataclasses.replace(settings.few(num_tokens, num_experts, inputs), **changes)
    return dataclasses.replace(settings.many(num_tokens, top_k, num_experts, inputs), **changes)


def add(kernel: str, layer: Layer, routing: Asked | Routing, **changes: Any) -> tuple[torch.Tensor, Routing]:
    """(0.25 + the updates, the routing)."""
    y_NO = layer.x_NI.new_full((len(layer.x_NI), layer.b_ERO.shape[2]), 0.25)
    kernels: Any = few if kernel == "few" else many
    if isinstance(routing, Routing):
        chosen = chosen_settings(kernel, layer, routing.weights_NK.shape[1], **changes)
        kernels.add_given_(y_NO, layer.x_NI, layer.a_ERI, layer.b_ERO, routing, chosen)
        return y_NO, routing
    chosen = chosen_settings(kernel, layer, routing.rule.top_k, **changes)
    return y_NO, kernels.add_([y_NO], layer.x_NI, [routing.layer], routing.rule, chosen).layer(0)


def true_scores(layer: Layer, bias_NE: torch.Tensor | None = None) -> torch.Tensor:
    x_NI = torch.nn.functional.layer_norm(layer.x_NI.double(), layer.x_NI.shape[1:], eps=EPS)
    scores_NE = x_NI @ layer.prototypes_EI.double().T
    return scores_NE if bias_NE is None else scores_NE + bias_NE


def check_choice(choice: Routing, scores_NE: torch.Tensor, error: float, temperature: float = 1.0) -> None:
    """The lower id of equal scores wins, so a stable sort says who is chosen."""
    top_k = choice.weights_NK.shape[1]
    assert choice.weights_NK.dtype == torch.float32 and choice.expert_ids_NK.dtype == torch.int64
    assert all(len(set(ids)) == top_k for ids in choice.expert_ids_NK.tolist())
    sorted_NE, order_NE = scores_NE.sort(dim=1, descending=True, stable=True)
    found_NK = scores_NE.gather(1, choice.expert_ids_NK)
    gaps_NK = (sorted_NE - torch.nn.functional.pad(sorted_NE, (0, 1), value=-math.inf)[:, 1:])[:, :top_k]
    clear_N = (gaps_NK > 2 * error).all(1)
    assert torch.equal(choice.expert_ids_NK[clear_N], order_NE[clear_N, :top_k])
    assert clear_N.double().mean() > 0.9  # so that the line above says something
    assert (found_NK >= sorted_NE[:, :top_k] - 2 * error).all()
    weights_NK = (found_NK / temperature).softmax(1)
    torch.testing.assert_close(choice.weights_NK.double(), weights_NK, rtol=0, atol=4 * error / temperature)


def check_y(y_NO: torch.Tensor, layer: Layer, choice: Routing) -> None:
    a, b = layer.a_ERI.double(), layer.b_ERO.double()
    expected = y_NO.new_full(y_NO.shape, 0.25, dtype=torch.float64)
    for n, x_I in enumerate(layer.x_NI.double()):
        for weight, e in zip(choice.weights_NK[n].double(), choice.expert_ids_NK[n].tolist(), strict=True):
            expected[n] += weight * ((a[e] @ x_I) @ b[e])
    error = (y_NO.double() - expected).norm(dim=1).max() / expected.norm(dim=1).max()
    assert error <= EPS_UNITS[y_NO.dtype] * torch.finfo(y_NO.dtype).eps


def check(kernel: str, shape: Shape, dtype: torch.dtype) -> None:
    layer = make_layer(shape, dtype)
    y_NO, choice = add(kernel, layer, ask(layer, shape.top_k))
    check_choice(choice, true_scores(layer), SCORE_ERROR[dtype])
    check_y(y_NO, layer, choice)


@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=pytest.mark.slow) for s in LARGER_SHAPES)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_shapes(kernel: str, shape: Shape) -> None:
    check(kernel, shape._replace(tokens=33) if kernel == "few" and shape.tokens > 33 else shape, torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("tokens", [1, 21])
@pytest.mark.parametrize("kernel", KERNELS)
def test_half_precision(kernel: str, tokens: int, dtype: torch.dtype) -> None:
    check(kernel, MIDDLE._replace(tokens=tokens), dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_row_keeps_its_low_bits(dtype: torch.dtype) -> None:
    """Many blocks of features in one program: a block that is overwritten too early spoils single rows' hi + lo."""
    layer = make_layer(MIDDLE._replace(tokens=130, inputs=520), dtype)
    scores = dataclasses.replace(settings.many(130, 2, 33, 520).scores, splits=1)
    y_NO, choice = add("many", layer, ask(layer, 2), scores=scores)
    check_choice(choice, true_scores(layer), SCORE_ERROR[dtype])
    check_y(y_NO, layer, choice)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_by_cublas(dtype: torch.dtype) -> None:
    """On a CPU by its own product. fp32 takes the kernel's all the same."""
    layer = make_layer(MIDDLE._replace(inputs=2100), dtype)  # the sums take two steps
    bias_NE = torch.randn(MIDDLE.tokens, MIDDLE.experts, device=DEVICE)
    y_NO, choice = add("many", layer, ask(layer, 2, bias_NE), cublas=True, shrink_rows=32)
    check_choice(choice, true_scores(layer, bias_NE), SCORE_ERROR[dtype])
    check_y(y_NO, layer, choice)


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_weights_from_sums_that_a_makes(top_k: int) -> None:
    """Masked experts, biases of single tokens, and none: their order depends on rstd only where a bias is finite."""
    layer = make_layer(MIDDLE._replace(inputs=300, experts=16), torch.bfloat16)  # a row of ones needs more rows
    layer.x_NI.mul_(torch.logspace(-1, 1, MIDDLE.tokens, device=DEVICE).unsqueeze(1))
    mask_1E = torch.zeros(1, 16, device=DEVICE)
    mask_1E[0, ::3] = -math.inf
    some_NE = mask_1E.repeat(MIDDLE.tokens, 1)
    some_NE[::2, 1] = 1.5
    for bias_NE in (None, mask_1E, some_NE):
        question = ask(layer, top_k, bias_NE, temperature=0.5)
        y_NO, choice = add("many", layer, question, cublas=True, shrink_splits=1, shrink_rows=64)
        check_choice(choice, true_scores(layer, bias_NE), SCORE_ERROR[torch.bfloat16], temperature=0.5)
        check_y(y_NO, layer, choice)


@pytest.mark.slow
def test_nothing_allowed_and_nan_where_a_makes_the_weights() -> None:
    layer = make_layer(MIDDLE, torch.bfloat16)
    bias_NE = torch.zeros(MIDDLE.tokens, MIDDLE.experts, device=DEVICE)
    bias_NE[4, 1:] = -math.inf
    bias_NE[5] = -math.inf
    late = {"cublas": True, "shrink_splits": 1, "shrink_rows": 64}
    clean_NO, choice = add("many", layer, ask(layer, 2, bias_NE), **late)
    assert choice.weights_NK[4].tolist() == [1.0, 0.0] and choice.weights_NK[5].tolist() == [0.0, 0.0]
    assert (clean_NO[5] == 0.25).all()
    layer.x_NI[2, 5] = math.nan
    y_NO, _ = add("many", layer, ask(layer, 2, bias_NE), **late)
    assert y_NO[2].isnan().all()
    rest = [n for n in range(MIDDLE.tokens) if n != 2]
    assert torch.equal(y_NO[rest], clean_NO[rest])


@pytest.mark.slow
def test_large_groups() -> None:
    check("many", LARGE, torch.float32)


def routings(shape: Shape) -> dict[str, torch.Tensor]:
    ids_NK = torch.randn(shape.tokens, shape.experts).topk(shape.top_k).indices
    return {
        "random": ids_NK,
        "one takes all": torch.full_like(ids_NK, 3),  # in both slots
        "only the last": torch.full_like(ids_NK, shape.experts - 1) - torch.arange(shape.top_k),
        "one each": torch.arange(ids_NK.numel()).remainder(shape.experts).view_as(ids_NK),
    }


@pytest.mark.slow
@pytest.mark.parametrize("pattern", routings(MIDDLE))
@pytest.mark.parametrize("kernel", KERNELS)
def test_given_routing(kernel: str, pattern: str) -> None:
    layer = make_layer(MIDDLE, torch.float32)
    ids_NK = routings(MIDDLE)[pattern].to(DEVICE)
    choice = Routing(torch.rand(ids_NK.shape, device=DEVICE), ids_NK)
    y_NO, _ = add(kernel, layer, choice)
    check_y(y_NO, layer, choice)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [16, 130])
@pytest.mark.parametrize("place_block_n", [16, 32])
def test_pairs_placed_in_several_steps(place_block_n: int, tokens: int) -> None:
    layer = make_layer(MIDDLE._replace(tokens=tokens), torch.float32)
    y_NO, choice = add("many", layer, ask(layer, 2), place_block_n=place_block_n)
    check_choice(choice, true_scores(layer), SCORE_ERROR[torch.float32])
    check_y(y_NO, layer, choice)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("pattern", routings(MIDDLE._replace(tokens=130)))
def test_tiles_cover_every_pair_once(pattern: str, rows: int) -> None:
    ids_NK = routings(MIDDLE._replace(tokens=130))[pattern].to(DEVICE)
    tiles = dataclasses.replace(settings.many(130, 2, MIDDLE.experts, 64), shrink_rows=16, expand_rows=rows)
    found = sort_pairs(narrow_ids(ids_NK.unsqueeze(0)), 130, MIDDLE.experts, tiles).layer(0)
    key = ids_NK * 2 + torch.arange(2, device=DEVICE)  # an expert's pairs of slot 0 first
    assert torch.equal(found.pairs_M.long(), key.flatten().argsort(stable=True))
    slots = [(found.shrink_tiles_3T, 16, None)] + [(found.expand_tiles_K3T[k], rows, k) for k in range(2)]
    for tiles_3T, tile_rows, slot in slots:
        seen = []
        for expert, first, end in tiles_3T.T.tolist():
            pairs = found.pairs_M[first : min(end, first + tile_rows)].tolist()
            assert all(int(ids_NK.flatten()[pair]) == expert for pair in pairs)
            seen += pairs
        assert sorted(seen) == [pair for pair in range(260) if slot is None or pair % 2 == slot]


@pytest.mark.slow
@pytest.mark.parametrize("columns", [1, 64])
def test_updates_by_ranges_of_columns(columns: int) -> None:
    layer = make_layer(MIDDLE._replace(outputs=150), torch.float32)
    question = ask(layer, 2)
    y_NO, choice = add("many", layer, question, expand_bytes=columns * MIDDLE.tokens * 4, expand_block_o=32)
    check_y(y_NO, layer, choice)
    at_once_NO, _ = add("many", layer, question, expand_block_o=32)
    assert torch.equal(y_NO, at_once_NO)


@pytest.mark.parametrize("kernel", KERNELS)
def test_ties_go_to_the_lower_id(kernel: str) -> None:
    """Whole numbers, whose products are exact in any order: so equal prototypes have equal scores on any processor."""
    layer = make_layer(MIDDLE, torch.float32)
    layer.x_NI.copy_(torch.randint(-8, 9, layer.x_NI.shape))
    half_EI = torch.randint(-8, 9, (MIDDLE.experts, MIDDLE.inputs // 2)) / 64
    layer.prototypes_EI.copy_(torch.cat([half_EI, -half_EI], dim=1))  # their sums are 0, and take nothing out
    layer.prototypes_EI[5] = layer.prototypes_EI[4]
    layer.prototypes_EI[20:] = layer.prototypes_EI[:13]  # e and e + 20 tie, and 4, 5, 24, 25
    _, choice = add(kernel, layer, ask(layer, 2))
    # rstd changes no order
    exact_NE = layer.x_NI.double() @ layer.prototypes_EI.double().T
    expected_NE = exact_NE.sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(choice.expert_ids_NK, expected_NE[:, :2])
    assert (choice.weights_NK[:, 0] == choice.weights_NK[:, 1]).double().mean() > 0.3  # twins were chosen
    layer.x_NI.zero_()
    _, choice = add(kernel, layer, ask(layer, 2))
    assert choice.expert_ids_NK.tolist() == [[0, 1]] * MIDDLE.tokens
    assert (choice.weights_NK == 0.5).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_bias_forbids_and_favours(kernel: str) -> None:
    layer = make_layer(MIDDLE, torch.float32)
    everywhere_1E = torch.zeros(1, MIDDLE.experts, device=DEVICE)
    everywhere_1E[0, 3:] = -math.inf
    y_NO, choice = add(kernel, layer, ask(layer, 2, everywhere_1E, temperature=0.3))
    check_choice(choice, true_scores(layer, everywhere_1E), SCORE_ERROR[torch.float32], temperature=0.3)
    check_y(y_NO, layer, choice)
    bias_NE = torch.randn(MIDDLE.tokens, MIDDLE.experts, device=DEVICE)
    bias_NE[:, 7] = 50.0
    bias_NE[4, 1:] = -math.inf  # one expert left
    bias_NE[5] = -math.inf  # none
    y_NO, choice = add(kernel, layer, ask(layer, 2, bias_NE))
    assert choice.weights_NK[4].tolist() == [1.0, 0.0] and choice.expert_ids_NK[4, 0] == 0
    assert choice.weights_NK[5].tolist() == [0.0, 0.0]
    assert (y_NO[5] == 0.25).all()
    rest = [n for n in range(MIDDLE.tokens) if n not in (4, 5)]
    assert (choice.expert_ids_NK[rest, 0] == 7).all()
    check_y(y_NO, layer, choice)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_large_mean_does_not_move_scores(kernel: str) -> None:
    """bf16 prototypes have a mean of their own; what it adds to the scores is taken out."""
    layer = make_layer(MIDDLE._replace(inputs=512), torch.bfloat16, mean=20.0)
    question = ask(layer, 2)
    _, choice = add(kernel, layer, question)
    # the sums of squares lose (mean / std)**2 eps of the variance
    check_choice(choice, true_scores(layer), SCORE_ERROR[torch.bfloat16] + 400 * 2**-22)
    no_sums = question.layer._replace(gate_sums_E=torch.zeros_like(question.layer.gate_sums_E))
    _, without = add(kernel, layer, question._replace(layer=no_sums))
    assert (without.weights_NK - choice.weights_NK).abs().max() > SCORE_ERROR[torch.bfloat16]


QKV, PAIR = (80, 24, 150), (140, 40)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "tokens", "outputs", "dtype"),
    [
        ("few", 1, QKV, torch.bfloat16),
        ("few", 1, PAIR, torch.float32),
        ("few", 13, QKV, torch.float32),
        ("few", 13, PAIR, torch.bfloat16),
        ("many", 13, QKV, torch.float32),
        ("many", 13, PAIR, torch.bfloat16),
        ("cublas", 13, QKV, torch.bfloat16),
        ("cublas", 13, PAIR, torch.float16),
        ("late", 13, QKV, torch.bfloat16),
    ],
    ids=str,
)
def test_layers_that_share_launches(kernel: str, tokens: int, outputs: tuple[int, ...], dtype: torch.dtype) -> None:
    """What each gets alone, with a bias of its own; beside y nothing is written."""
    # enough features for two splits of A
    shape = MIDDLE._replace(tokens=tokens, experts=18, inputs=520 if kernel == "few" else 300)
    layers = [make_layer(shape._replace(outputs=o), dtype) for o in outputs]
    x_NI = layers[0].x_NI
    layers = [layer._replace(x_NI=x_NI) for layer in layers]
    biases = [torch.randn(1, shape.experts, device=DEVICE) for _ in layers]
    if kernel == "late":  # where nothing but a mask is added, A makes the weights
        biases = [torch.where(bias_NE > 1, -math.inf, 0.0) for bias_NE in biases]
    questions = [ask(layer, 2, bias_NE) for layer, bias_NE in zip(layers, biases, strict=True)]
    kernels: Any = few if kernel == "few" else many
    shapes = tokens, 2, shape.experts, shape.inputs, len(layers)
    chosen: Any = settings.few(tokens, *shapes[2:]) if kernel == "few" else settings.many(*shapes)
    assert chosen.shrink_splits > 1
    if kernel != "few":
        rows = {"shrink_splits": 1, "shrink_rows": 64} if kernel == "late" else {"shrink_rows": 16}
        chosen = dataclasses.replace(chosen, cublas=kernel in ("cublas", "late"), **rows)
    wide = [x_NI.new_full((tokens, o + 9), 0.25) for o in outputs]
    ys = [wide_NO[:, :o] for wide_NO, o in zip(wide, outputs, strict=True)]
    rule = questions[0].rule
    choices = kernels.add_(ys, x_NI, [question.layer for question in questions], rule, chosen)
    for g, (layer, question) in enumerate(zip(layers, questions, strict=True)):
        y_NO = torch.full_like(ys[g], 0.25)
        alone = kernels.add_([y_NO], x_NI, [question.layer], rule, chosen).layer(0)
        assert all(torch.equal(one, other) for one, other in zip(choices.layer(g), alone, strict=True))
        # another y is read in other pieces, and so another order of the sum over R
        torch.testing.assert_close(ys[g], y_NO, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
        assert (wide[g][:, outputs[g] :] == 0.25).all()
        check_choice(alone, true_scores(layer, biases[g]), SCORE_ERROR[dtype])
        check_y(y_NO, layer, alone)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_layer_after_the_updates(dtype: torch.dtype) -> None:
    """y is written before it is read; the updates are rounded once more than beside the base layer."""
    layer = make_layer(MIDDLE, dtype)
    weight_OI = (torch.randn(MIDDLE.outputs, MIDDLE.inputs, device=DEVICE) / MIDDLE.inputs**0.5).to(dtype)
    chosen, question = settings.many(MIDDLE.tokens, 2, MIDDLE.experts, MIDDLE.inputs), ask(layer, 2)
    (y_NO,), choice = many.linears(layer.x_NI, [weight_OI], [question.layer], question.rule, chosen)
    alone_NO = torch.nn.functional.linear(layer.x_NI, weight_OI)
    expected = many.add_([alone_NO], layer.x_NI, [question.layer], question.rule, chosen)
    assert all(torch.equal(one, other) for one, other in zip(choice, expected, strict=True))
    scale = float(alone_NO.float().abs().max())
    assert float((y_NO.float() - alone_NO.float()).abs().max()) <= 2 * torch.finfo(dtype).eps * scale


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_nan_stays_in_its_row(kernel: str) -> None:
    layer = make_layer(MIDDLE, torch.float32)
    clean, _ = add(kernel, layer, ask(layer, 2))
    layer.x_NI[2, 5] = math.nan
    y_NO, choice = add(kernel, layer, ask(layer, 2))
    assert y_NO[2].isnan().all()
    assert ((choice.expert_ids_NK >= 0) & (choice.expert_ids_NK < MIDDLE.experts)).all()
    rest = [n for n in range(MIDDLE.tokens) if n != 2]
    assert torch.equal(y_NO[rest], clean[rest])


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_same_bits_twice(kernel: str) -> None:
    layer = make_layer(MIDDLE, torch.bfloat16)
    once, again = (add(kernel, layer, ask(layer, 2)) for _ in range(2))
    assert torch.equal(once[0], again[0])
    assert torch.equal(once[1].weights_NK, again[1].weights_NK)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_rows_with_a_stride(kernel: str) -> None:
    layer = make_layer(MIDDLE, torch.float32)
    wide_NI = torch.cat([layer.x_NI, torch.full_like(layer.x_NI, math.nan)], dim=1)
    found, _ = add(kernel, layer._replace(x_NI=wide_NI[:, : MIDDLE.inputs]), ask(layer, 2))
    expected, _ = add(kernel, layer, ask(layer, 2))
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS)
def test_nothing_grows_with_tokens_times_experts_times_features(kernel: str) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if "empty" in str(func):  # not what the interpreter copies
                self.numel = max(self.numel, out.numel())
            return out

    shape = Shape(tokens=48, top_k=2, experts=50, rank=16, inputs=256, outputs=256)
    layer, splits = make_layer(shape, torch.float32), 16
    question = ask(layer, 2)
    with Largest() as seen:
        add(kernel, layer, question)
    assert 0 < seen.numel <= splits * shape.tokens * max(shape.experts, shape.top_k * shape.rank)
    assert seen.numel < shape.tokens * shape.experts * shape.rank


def test_settings_fit_every_shape() -> None:
    for tokens in (1, 2, 5, 31, 64, 65, 1000, 100_000):
        for experts in (1, 2, 33, 166, 1000, 4000):
            for inputs in (8, 576, 2048, 14336):
                for_few, for_many = settings.few(tokens, experts, inputs), settings.many(tokens, 2, experts, inputs)
                for scores in (for_few.scores, for_many.scores):
                    assert scores.splits == 1 or scores.splits * scores.block_i <= inputs
                assert for_few.shrink_splits == settings.power_of_two(for_few.shrink_splits)
                sizes = (for_many.place_block_n, for_many.place_warps, for_many.shrink_rows, for_many.expand_rows)
                for size in sizes:
                    assert size == settings.power_of_two(size)
                assert min(for_many.shrink_rows, for_many.expand_rows) >= 16
