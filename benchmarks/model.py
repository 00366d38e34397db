"""A whole model, routed among many experts, beside the same model without any, in one run.

    python benchmarks/model.py --shape llama3-8b --dtype bf16 --device cuda --backend triton \\
        --out benchmarks/rows/model.csv

Random weights at true shapes, experts of random weights on every linear layer but the output head, router `phatgoose`.

`decode`: one token of each sequence behind a prompt, with transformers' static cache. Of T5-XL's 432 sites such a step
runs 216: the encoder and the keys and values of cross-attention were computed with the prompt.
`prefill`: whole prompts, logits of the last position.
`generate`: transformers' `generate` with its static cache, prompt included, greedy; on a GPU it compiles each model,
which takes minutes, and records its graphs again in every call, because the cache is a new one.
On a GPU both sides of the first two are replays of a CUDA graph, on a CPU plain calls. Medians of interleaved rounds.

`ratio` is routed tokens/s over base tokens/s, and `lora_ratio` that of one static LoRA of the same rank on the same
layers, as three plain products and an add. `bytes_bound` is what it would be if time went by the bytes that are
read (the base's weights and the static cache; with experts also the gates and the chosen experts' factors, counted in
the call that is timed), `flops_bound` if it went by the products with weights; see `bounds.py`. `bound` is the one that
counts, bytes for decode. For more sequences the bound is lower: they choose more experts. Rows replace those of the
same device and case.

`--switches` measures one model after the other with switches of `KernelOptions` on: `none`, `beside`, or more of
them joined by +. Column `backend` names those that were on.

Memory, llama3-8b, 166 experts of rank 16, bf16: 16.1 GB base, 13.9 GB factors, 0.8 GB gates as the kernels keep them
and 0.8 GB in fp32, 0.5 GB a cache of 32 x 129 tokens: 33 GB with a prefill's activations, so one GPU of 80 GB is
plenty. t5-xl: 5.6 GB base, 11.7 GB factors, 1.4 GB gates.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any

import torch
from bounds import Work, base_work, experts_work
from measuring import device_name, milliseconds, replace_rows
from replays import graph
from torch import nn
from transformers import EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.config import RouterConfig
from phatgoose.experts.stack import SiteStack
from phatgoose.kernels import BACKENDS, DEFAULT_OPTIONS, KernelOptions
from phatgoose.models.base import DTYPES
from phatgoose.models.wrapped import WrappedLinear
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.routing.fused import group_layers
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.state import RoutingState

Call = Callable[[], torch.Tensor]
WHAT = ("decode", "prefill", "generate")
SHAPES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama3-8b": (LlamaForCausalLM, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    }),
    "smollm2-135m": (LlamaForCausalLM, {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }),
    "t5-xl": (T5, {
        "vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24,
        "num_heads": 32, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }),
    "tiny": (LlamaForCausalLM, {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
    }),
    "tiny-t5": (T5, {
        "vocab_size": 512, "d_model": 64, "d_kv": 16, "d_ff": 160, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
    }),
}  # fmt: skip
# fields of `KernelOptions`: name there, off, on
SWITCHES: dict[str, tuple[str, Any, Any]] = {
    "beside": ("overlap_base", False, True),
    "shared": ("share_input", False, True),
    "after": ("base_last", False, True),
    "pdl": ("pdl_max_tokens", 0, DEFAULT_OPTIONS.pdl_max_tokens),
}
NAMES = {"beside": "base beside", "shared": "shared input", "after": "base after", "pdl": "pdl"}
# what a row is measured on; others stay when it is written
KEYS = ("device", "shape", "dtype", "backend", "experts", "rank", "top_k", "what", "sequences")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--what", choices=WHAT, nargs="+", default=["decode", "prefill"])
    parser.add_argument("--experts", type=int, nargs="+", default=[166])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences in decode and generate")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the decoded ones")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each sequence in generate")
    parser.add_argument("--prefill", type=int, nargs=2, default=[4, 1024], help="sequences, and tokens of each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=480, help="begin no case after this")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument(
        "--switches", nargs="+", default=[switches_of(DEFAULT_OPTIONS)], help="the package's own if not given"
    )
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    begin = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {text}", flush=True)

    models = {"base": make_model(args)}
    models["one LoRA"] = with_one_lora(models["base"], args)
    compile_first(models["base"], args)
    say(f"{args.shape}: base model made")
    for experts, switches in product(args.experts, args.switches):
        options = options_of(switches)
        models["routed"] = routed_randomly(models["base"], experts, options, args)
        say(f"{experts} experts added, {switches}; {memory(args)}")
        for what, batch in cases(args, models["base"]):
            if time.perf_counter() - begin > args.seconds:
                say("out of time; the rest is left out")
                return
            try:
                found = measure(models, experts, what, batch, options, args)
            except RuntimeError as error:  # no memory, or something that no graph can hold
                say(f"no row of {what}, {batch} sequences: {type(error).__name__} {str(error)[:300]}")
                continue
            say("  ".join(f"{name} {value}" for name, value in list(found.items())[2:]) + f"; {memory(args)}")
            if args.out:
                replace_rows(args.out, [found], *KEYS)
        del models["routed"]


def switches_of(options: KernelOptions) -> str:
    """The names of those that are on, joined by +; "none" if there are none."""
    return "+".join(name for name, (field, off, _) in SWITCHES.items() if getattr(options, field) != off) or "none"


def options_of(switches: str) -> KernelOptions:
    """These switches on, and the others off."""
    chosen = set(switches.split("+")) - {"none"}
    if not chosen <= SWITCHES.keys():
        raise SystemExit(f"unknown switches {switches}; known: none, {', '.join(SWITCHES)}")
    return KernelOptions(**{field: on if name in chosen else off for name, (field, off, on) in SWITCHES.items()})


def cases(args: argparse.Namespace, model: Any) -> list[tuple[str, int]]:
    """What is measured, and with how many sequences. Encoder-decoder models have no prefill of their own."""
    batches = dict.fromkeys(WHAT, args.batches) | {"prefill": [] if isinstance(model, T5) else args.prefill[:1]}
    # in the order of WHAT: what compiles comes last
    return [(what, batch) for what in WHAT if what in args.what for batch in batches[what]]


def measure(
    models: dict[str, Any], experts: int, what: str, batch: int, options: KernelOptions, args: argparse.Namespace
) -> dict[str, object]:
    """One row."""
    makers = {"decode": decode, "prefill": prefill, "generate": generate}
    calls = {name: makers[what](model, batch, args) for name, model in models.items()}
    # of generate the last step is counted: one token of each sequence
    counted = {name: decode(model, batch, args) for name, model in models.items()} if what == "generate" else calls
    work = base_work(models["base"], counted["base"]), experts_work(models["routed"], counted["routed"])
    if args.device.startswith("cuda") and what != "generate":
        calls = {name: captured(name, call) for name, call in calls.items()}
    try:
        times = milliseconds({name: waiting(call, args.device) for name, call in calls.items()}, args.rounds)
    finally:
        for model in models.values():  # what generate leaves on a model; it cannot be copied
            for name in ("_compiled_call", "_last_compile_config"):
                vars(model).pop(name, None)
    cache = getattr(counted["base"], "cache_bytes", 0)
    return row(args, options, experts, what, batch, times, *work, cache)


def memory(args: argparse.Namespace) -> str:
    """The most that was allocated so far."""
    if not args.device.startswith("cuda"):
        return "memory not counted"
    return f"at most {torch.cuda.max_memory_allocated() / 1e9:.1f} GB so far"


def compile_first(model: Any, args: argparse.Namespace) -> None:
    """Compile with all cores what the routed layers will launch."""
    if not args.device.startswith("cuda") or args.backend != "triton" or args.dtype != "bf16":
        return
    from compile_kernels import RANK, TOP_K, compile_layers

    if (args.rank, args.top_k) != (RANK, TOP_K):
        return
    tokens = {batch * length for batch in args.batches for length in (1, args.prompt)}
    if "prefill" in args.what:
        tokens.add(args.prefill[0] * args.prefill[1])
    head = model.get_output_embeddings()
    shapes = {(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear) and m is not head}
    number = compile_layers(
        [
            {"tokens": t, "experts": experts, "inputs": inputs, "outputs": outputs}
            for t in sorted(tokens)
            for experts in args.experts
            for inputs, outputs in sorted(shapes)
        ]
    )
    print(f"{number} kernels compiled", flush=True)


def make_model(args: argparse.Namespace) -> Any:
    """Random weights, made where they will be used."""
    kind, options = SHAPES[args.shape]
    config = T5Config(**options, pad_token_id=0, decoder_start_token_id=0) if kind is T5 else LlamaConfig(**options)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[args.dtype])
    try:
        with torch.device(args.device):
            return kind(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


def routed_randomly(model: Any, experts: int, options: KernelOptions, args: argparse.Namespace) -> Any:
    """The same model, its weights shared, with a routed layer around every linear layer but the output head."""
    routed = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    head = routed.get_output_embeddings()
    dtype = DTYPES[args.dtype]
    state = RoutingState()
    for site, linear in list(routed.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            width, height = linear.in_features, linear.out_features
            with torch.device(args.device):
                stack = SiteStack(
                    a_ERI=torch.randn(experts, args.rank, width, dtype=dtype) / width**0.5,
                    b_ERO=torch.randn(experts, args.rank, height, dtype=dtype) * 0.01,
                    gates_EI=torch.randn(experts, width),
                    present_E=torch.ones(experts, dtype=torch.bool),
                )
                router = Phatgoose(stack, RouterConfig(top_k=args.top_k)).to(args.device)
            routed.set_submodule(
                site, RoutedLinear(linear, stack, router, args.backend, options, site=site, state=state)
            )
    if options.share_input:
        group_layers(module for module in routed.modules() if isinstance(module, RoutedLinear))
    return routed


class OneLora(WrappedLinear):
    """A linear layer with one static LoRA beside it."""

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__(base)
        weight_OI = base.weight
        self.a_RI = nn.Parameter(torch.randn_like(weight_OI[:rank]) / weight_OI.shape[1] ** 0.5, requires_grad=False)
        self.b_OR = nn.Parameter(torch.randn_like(weight_OI[:, :rank]) * 0.01, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x of shape (..., I) -> (..., O)."""
        y: torch.Tensor = self.base(x)
        return y + nn.functional.linear(nn.functional.linear(x, self.a_RI), self.b_OR)


def with_one_lora(model: Any, args: argparse.Namespace) -> Any:
    """The same model, its weights shared, with one LoRA on every linear layer but the output head."""
    adapted = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    head = adapted.get_output_embeddings()
    for site, linear in list(adapted.named_modules()):
        if isinstance(linear, nn.Linear) and linear is not head:
            adapted.set_submodule(site, OneLora(linear, args.rank))
    return adapted


def random_ids(batch: int, length: int, model: Any, args: argparse.Namespace) -> torch.Tensor:
    """Drawn on the host: a capture that fails may spoil the device's generator."""
    return torch.randint(3, model.config.vocab_size, (batch, length)).to(args.device)


def decode(model: Any, batch: int, args: argparse.Namespace) -> Call:
    """One more token for each of `batch` sequences behind a prompt; the same one in every call."""
    config = model.config.get_text_config(decoder=True)
    ids = random_ids(batch, args.prompt, model, args)
    written: Any = StaticCache(config=config, max_cache_len=args.prompt + 1)
    cache: Any = written
    fixed: dict[str, Any] = {}
    with torch.no_grad():
        if isinstance(model, T5):
            # the decoder's prompt is as long as the encoder's
            cache = EncoderDecoderCache(written, StaticCache(config=config, max_cache_len=args.prompt))
            read = model.get_encoder()(input_ids=ids).last_hidden_state
            fixed = {"encoder_outputs": BaseModelOutput(last_hidden_state=read)}
        name = "decoder_input_ids" if isinstance(model, T5) else "input_ids"
        fixed |= {"past_key_values": cache, "use_cache": True}
        model(**{name: ids}, **fixed)
    lengths = torch.full((len(written.layers), 1), args.prompt, device=args.device)
    for layer, length in zip(written.layers, lengths, strict=True):
        layer.cumulative_length = length.view_as(layer.cumulative_length)

    def step() -> torch.Tensor:
        lengths.fill_(args.prompt)
        logits: torch.Tensor = model(**{name: ids[:, :1]}, **fixed).logits
        return logits

    caches = [cache] if cache is written else [cache.self_attention_cache, cache.cross_attention_cache]
    step.cache_bytes = sum(t.nbytes for c in caches for layer in c.layers for t in (layer.keys, layer.values))  # type: ignore[attr-defined]
    return step


def prefill(model: Any, batch: int, args: argparse.Namespace) -> Call:
    """Prompts from the first token to the last."""
    ids = random_ids(batch, args.prefill[1], model, args)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


def generate(model: Any, batch: int, args: argparse.Namespace) -> Call:
    """`--new-tokens` for each of `batch` prompts, whatever they are."""
    ids = random_ids(batch, args.prompt, model, args)
    model.generation_config.eos_token_id = None
    length = {"max_new_tokens": args.new_tokens, "do_sample": False, "cache_implementation": "static"}
    return lambda: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **length)


@torch.no_grad()
def captured(name: str, call: Call) -> Call:
    """A call as the replay of a CUDA graph; says so if that gives something else."""
    plain = call().clone()
    replay: Any = graph([call])
    (output,) = replay.kept
    replay()
    difference = float((output - plain).float().norm() / plain.float().norm())
    # transformers masks a captured prompt in another way, which rounds differently
    if not difference < 0.05:
        print(f"  the graph of {name} differs from a plain call by {difference:.3f} of the output", flush=True)

    def run() -> torch.Tensor:
        replay()
        return output

    return run


def waiting(call: Call, device: str) -> Call:
    """A call that returns when the device has finished."""

    def wait() -> torch.Tensor:
        output = call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return output

    return wait


def row(
    args: argparse.Namespace,
    options: KernelOptions,
    experts: int,
    what: str,
    batch: int,
    times: dict[str, float],
    base: Work,
    added: Work,
    cache: int,
) -> dict[str, object]:
    """One line of the CSV."""
    length = {"decode": 1, "prefill": args.prefill[1], "generate": args.new_tokens}[what]
    tokens = batch * length
    ratio = times["base"] / times["routed"]
    bytes_bound = (base.bytes + cache) / (base.bytes + cache + added.bytes)
    flops_bound = base.flops / (base.flops + added.flops)
    bound = flops_bound if what == "prefill" else bytes_bound
    # other kernels than Triton's have no switches
    triton = args.backend == "triton" or (args.backend == "auto" and args.device.startswith("cuda"))
    named = [NAMES[name] for name in switches_of(options).split("+") if triton and name in NAMES]
    return {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "shape": args.shape,
        "dtype": args.dtype,
        "backend": ", ".join([args.backend, *named]),
        "experts": experts,
        "rank": args.rank,
        "top_k": args.top_k,
        "what": what,
        "sequences": batch,
        "base_ms": f"{times['base']:.3f}",
        "routed_ms": f"{times['routed']:.3f}",
        "base_tokens_a_second": f"{tokens / times['base'] * 1e3:.0f}",
        "routed_tokens_a_second": f"{tokens / times['routed'] * 1e3:.0f}",
        "ratio": f"{ratio:.3f}",
        "lora_ms": f"{times['one LoRA']:.3f}",
        "lora_ratio": f"{times['base'] / times['one LoRA']:.3f}",
        "bound": f"{bound:.3f}",
        "ratio_to_bound": f"{ratio / bound:.3f}",
        "bytes_bound": f"{bytes_bound:.3f}",
        "flops_bound": f"{flops_bound:.3f}",
        "base_gb": f"{base.bytes / 1e9:.3f}",
        "cache_gb": f"{cache / 1e9:.3f}",
        "experts_gb": f"{added.bytes / 1e9:.3f}",
        "sites": added.sites,
        "experts_a_site": f"{added.experts / added.sites:.1f}",
    }


if __name__ == "__main__":
    main()
