"""What only a GPU can show: captured graphs, compiled layers, no waiting for the device. Skipped without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from helpers.checks import assert_close
from helpers.models import llama, paged_cache
from helpers.pools import make_expert, make_pool
from phatgoose import kernels
from phatgoose.config import RouterConfig
from phatgoose.experts.expert import Expert
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import DEFAULT_OPTIONS, KernelOptions
from phatgoose.kernels.operators import pack
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.model import RoutedModel
from phatgoose.routing.state import IDLE

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
EXPERTS, RANK, INPUTS, OUTPUTS = 33, 16, 256, 320
TOKENS = [1, 40, 300]  # few, few with matrix units, many


def make_linear(
    backend: kernels.Backend = "auto",
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    options: KernelOptions = DEFAULT_OPTIONS,
) -> RoutedLinear:
    torch.manual_seed(0)
    stack = SiteStack(
        a_ERI=(torch.randn(EXPERTS, RANK, INPUTS) / 16).to(dtype),
        b_ERO=(torch.randn(EXPERTS, RANK, OUTPUTS) / 4).to(dtype),
        gates_EI=torch.randn(EXPERTS, INPUTS),
        present_E=torch.arange(EXPERTS) % 7 != 3,
    )
    base = torch.nn.Linear(INPUTS, OUTPUTS, bias=bias).to("cuda", dtype).requires_grad_(False)
    return RoutedLinear(base, stack, Phatgoose(stack, RouterConfig(top_k=2)), backend, options).cuda()


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    error = (found.double() - expected.double()).norm(dim=-1).max() / expected.double().norm(dim=-1).max()
    return bool(error <= 6 * torch.finfo(found.dtype).eps)


@pytest.mark.parametrize("tokens", TOKENS)
def test_auto_is_triton_and_agrees(tokens: int) -> None:
    linear, plain = make_linear(), make_linear("grouped")
    assert linear.backend == "triton" and linear.group is not None
    x = torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert close(linear(x), plain(x))


@pytest.mark.parametrize("tokens", TOKENS)
def test_does_not_wait_for_the_device(tokens: int) -> None:
    linear = make_linear()
    x = torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        linear(x)
        torch.cuda.set_sync_debug_mode("error")
        try:
            linear(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tokens", TOKENS)
def test_captured_graph_follows_inputs_and_slots(tokens: int) -> None:
    """New activations, and an expert added and removed in place, without another capture."""
    linear = make_linear()
    x = torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        linear(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = linear(x)
        for turn in range(3):
            x.copy_(torch.randn_like(x))
            linear.router.absent_E[turn] = -torch.inf
            linear.b_ERO[turn + 4].copy_(torch.randn_like(linear.b_ERO[0]))
            y.fill_(torch.nan)
            graph.replay()
            assert torch.equal(y, linear(x))


@pytest.mark.parametrize("router", ["phatgoose", "arrow", "merged"])
def test_captured_graph_follows_the_pool(router: str, tmp_path: Path) -> None:
    """Experts added to and removed from a whole model, without another capture: as if it had been built so."""
    pool = make_pool(llama, tmp_path)
    model = RoutedModel.from_pool(llama().cuda(), pool, router=router, capacity=5)
    block = model.model.model.layers[0].mlp
    x = torch.randn(2, 9, 32, device="cuda")

    def check() -> None:
        y.fill_(torch.nan)
        graph.replay()
        scratch = RoutedModel.from_pool(llama().cuda(), model.pool, router=router)
        assert_close(y, scratch.model.model.layers[0].mlp(x), relative=1e-4)

    with torch.no_grad():
        block(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
        check()
        model.add_expert(Expert(make_expert(llama, tmp_path / "e3", seed=3, r=4)))
        check()
        model.remove_expert("e1")
        check()
        model.add_expert(Expert(make_expert(llama, tmp_path / "e4", seed=4)))
        check()


@pytest.mark.parametrize("tokens", TOKENS)
def test_beside_the_base_is_the_same(tokens: int) -> None:
    """Two streams in a graph, many times in a row, so that a race over memory would show."""
    linear = make_linear()
    assert linear.group is not None
    layer, base, rule = linear.layer(linear.added_scores(IDLE, tokens)), linear.base, linear.group.rule
    packed = pack([layer], rule, KernelOptions())
    with torch.no_grad():
        xs = [torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16) for _ in range(50)]
        torch.ops.phatgoose.routed_linears(xs[0], [base.weight], [base.bias], *packed)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = [torch.ops.phatgoose.routed_linears(x, [base.weight], [base.bias], *packed)[0][0] for x in xs]
        for y in found:
            y.fill_(torch.nan)
        graph.replay()
        for x, y in zip(xs, found, strict=True):
            expected = base(x)
            kernels.route_and_add_([expected], x, [layer], rule)
            assert torch.equal(y, expected)


def test_the_base_after_the_updates() -> None:
    """Many tokens; the updates are rounded once more."""
    last, first = (make_linear(bias=False, options=KernelOptions(base_last=base_last)) for base_last in (True, False))
    x = torch.randn(300, INPUTS, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        assert close(last(x), first(x))


@pytest.mark.parametrize("tokens", TOKENS)
def test_compiles_as_one_graph(tokens: int) -> None:
    linear = make_linear()
    compiled = torch.compile(linear, fullgraph=True, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(tokens, INPUTS, device="cuda", dtype=torch.bfloat16)
            assert close(compiled(x).clone(), linear(x))


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40])
def test_layers_that_share_launches(tokens: int, dtype: torch.dtype, beside: bool, tmp_path: Path) -> None:
    """Gate and up in the launches of one, captured; the sums of few and many splits differ by rounding."""
    pool = make_pool(llama, tmp_path, num_experts=5)
    shared, alone = (
        RoutedModel.from_pool(llama().to("cuda", dtype), pool, kernel_options=options)
        for options in (KernelOptions(overlap_base=beside), KernelOptions(overlap_base=beside, share_input=False))
    )
    blocks = [model.model.model.layers[0].mlp for model in (shared, alone)]
    assert len(blocks[0].up_proj.group.linears) == 2
    x = torch.randn(tokens, 32, device="cuda", dtype=dtype)
    with torch.no_grad():
        blocks[0](x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = blocks[0](x)
        for _ in range(3):
            x.copy_(torch.randn_like(x))
            y.fill_(torch.nan)
            graph.replay()
            assert_close(y, blocks[1](x), relative=1e-4 if dtype == torch.float32 else 2e-2)


def test_generates_with_a_static_cache(tmp_path: Path) -> None:
    """transformers compiles the decoding step; greedy tokens in fp32 are those of the plain backend."""
    pool = make_pool(llama, tmp_path)
    ids = torch.randint(3, 90, (2, 7), device="cuda")
    found = []
    for backend in ("grouped", "triton"):
        model = RoutedModel.from_pool(llama().cuda(), pool, backend=backend)
        options = {"cache_implementation": "static"} if backend == "triton" else {}
        found.append(model.generate(ids, max_new_tokens=8, do_sample=False, **options))
    assert torch.equal(*found)


def test_generate_batch_captures_its_steps(tmp_path: Path) -> None:
    """transformers' continuous batching with CUDA graphs writes what `generate` writes."""
    from transformers import GenerationConfig

    model = RoutedModel.from_pool(llama().cuda(), make_pool(llama, tmp_path))
    prompts = [torch.randint(3, 90, (n,)).tolist() for n in (5, 8, 3)]
    config = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=-1, pad_token_id=0)
    cache = paged_cache(256, num_blocks=8, max_batch_tokens=64, use_cuda_graph=True)
    outputs = model.generate_batch(prompts, config, cache)
    found = sorted((list(out.prompt_ids), list(out.generated_tokens)) for out in outputs.values())
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device="cuda")
        written = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append((prompt, written[0, len(prompt) :].tolist()))
    assert found == sorted(expected)
