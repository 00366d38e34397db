"""A whole model, routed among many experts, beside the same model without any, in one run.

    python benchmarks/model.py --shape llama3-8b --dtype bf16 --device cuda --out benchmarks/rows/model.csv

Random weights at true shapes, experts of random weights on every linear layer but
the output head, router `phatgoose`. `decode`: one token of each sequence behind a
prompt, with transformers' static cache. `prefill`: whole prompts, logits of the last
position. On a GPU both sides are replays of a CUDA graph, on a CPU plain calls.
Medians of interleaved rounds; `ratio` is routed tokens/s over base tokens/s.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from measuring import device_name, milliseconds, replace_rows
from torch import nn
from transformers import EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, StaticCache, T5Config
from transformers import T5ForConditionalGeneration as T5
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.base import DTYPES
from phatgoose.config import RouterConfig
from phatgoose.kernels import BACKENDS
from phatgoose.routed_linear import RoutedLinear
from phatgoose.routers.phatgoose import Phatgoose
from phatgoose.stack import SiteStack

Call = Callable[[], torch.Tensor]
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


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--experts", type=int, nargs="+", default=[166])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences in decode")
    parser.add_argument("--prompt", type=int, default=128, help="tokens before the decoded one")
    parser.add_argument("--prefill", type=int, nargs=2, default=[4, 1024], help="sequences, and tokens of each")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    models = {"base": make_model(args)}
    rows = []
    for experts in args.experts:
        models["routed"] = routed_randomly(models["base"], experts, args)
        for what, batch in [*(("decode", batch) for batch in args.batches), ("prefill", args.prefill[0])]:
            if what == "prefill" and isinstance(models["base"], T5):
                continue
            calls = {
                name: decode(model, batch, args) if what == "decode" else prefill(model, args)
                for name, model in models.items()
            }
            if args.device.startswith("cuda"):
                calls = {name: captured(call) for name, call in calls.items()}
            times = milliseconds({name: waiting(call, args.device) for name, call in calls.items()}, args.rounds)
            rows.append(row(args, experts, what, batch, times))
            print("  ".join(f"{name} {value}" for name, value in list(rows[-1].items())[2:]), flush=True)
            del calls
        del models["routed"]
    if args.out:
        replace_rows(args.out, rows, "device")


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


def routed_randomly(model: Any, experts: int, args: argparse.Namespace) -> Any:
    """The same model, its weights shared, with a routed layer around every linear layer but the output head."""
    routed = deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    head = routed.get_output_embeddings()
    dtype = DTYPES[args.dtype]
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
            routed.set_submodule(site, RoutedLinear(linear, stack, router, args.backend))
    return routed


def decode(model: Any, batch: int, args: argparse.Namespace) -> Call:
    """One more token for each of `batch` sequences behind a prompt; the same one in every call."""
    config = model.config.get_text_config(decoder=True)
    ids = torch.randint(3, config.vocab_size, (batch, args.prompt), device=args.device)
    written = StaticCache(config=config, max_cache_len=args.prompt + 1)
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

    return step


def prefill(model: Any, args: argparse.Namespace) -> Call:
    """Prompts from the first token to the last."""
    ids = torch.randint(3, model.config.vocab_size, tuple(args.prefill), device=args.device)
    return lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1).logits


@torch.no_grad()
def captured(call: Call) -> Call:
    """A call as the replay of a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def waiting(call: Call, device: str) -> Call:
    """A call that returns when the device has finished."""

    def wait() -> torch.Tensor:
        output = call()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return output

    return wait


def row(args: argparse.Namespace, experts: int, what: str, batch: int, times: dict[str, float]) -> dict[str, object]:
    """One line of the CSV."""
    tokens = batch * (args.prefill[1] if what == "prefill" else 1)
    return {
        "device": device_name(args.device),
        "torch": torch.__version__,
        "shape": args.shape,
        "dtype": args.dtype,
        "backend": args.backend,
        "experts": experts,
        "rank": args.rank,
        "top_k": args.top_k,
        "what": what,
        "sequences": batch,
        "base_ms": f"{times['base']:.3f}",
        "routed_ms": f"{times['routed']:.3f}",
        "base_tokens_a_second": f"{tokens / times['base'] * 1e3:.0f}",
        "routed_tokens_a_second": f"{tokens / times['routed'] * 1e3:.0f}",
        "ratio": f"{times['base'] / times['routed']:.3f}",
    }


if __name__ == "__main__":
    main()
