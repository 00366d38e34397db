"""Tiny real models with their tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

PAD, EOS = 0, 1
VOCABULARY = 97
ModelFactory = Callable[[], PreTrainedModel]


def llama(**changes: Any) -> PreTrainedModel:
    """Grouped-query attention, and a width that is no multiple of 8."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": EOS,
        "tie_word_embeddings": False,
    }
    config = LlamaConfig(**(options | changes))
    return _named(LlamaForCausalLM, config, "tiny-llama")


def gpt2() -> PreTrainedModel:
    """Conv1D layers, whose weights lie transposed."""
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_inner=52,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        pad_token_id=PAD,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    return _named(GPT2LMHeadModel, config, "tiny-gpt2")


def t5() -> PreTrainedModel:
    """Encoder-decoder with a gated feed-forward, as T5 v1.1."""
    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=24,
        d_kv=8,
        d_ff=36,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
        decoder_start_token_id=PAD,
        tie_word_embeddings=False,
    )
    return _named(T5ForConditionalGeneration, config, "tiny-t5")


MODELS: dict[str, ModelFactory] = {"llama": llama, "gpt2": gpt2, "t5": t5}
TARGETS: dict[str, list[str]] = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
}


def _named(model_class: Any, config: Any, name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model = model_class(config).eval()
    # as load_base leaves it
    model.config._name_or_path = model.name_or_path = name
    return model


def make_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Token i is the word "<i>": a text is the list of its token ids (see `as_text`)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"<{i}>": i for i in range(vocabulary)}, unk_token="<2>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    special = {"pad_token": f"<{PAD}>", "eos_token": f"<{EOS}>", "unk_token": "<2>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def make_base(factory: ModelFactory, folder: Path) -> Path:
    """The model and a tokenizer, saved so that commands find them."""
    factory().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def paged_cache(page_size: int, **options: Any) -> Any:
    """A configuration of continuous batching; without one, its cache would be as large as the memory."""
    from transformers import ContinuousBatchingConfig

    # the field's name, now and in transformers 5.17
    field = "page_size" if "page_size" in ContinuousBatchingConfig.__dataclass_fields__ else "block_size"
    return ContinuousBatchingConfig(**{field: page_size}, **options)
