"""Tiny real models, adapters, gates and pools, built on the spot."""

from __future__ import annotations

import gzip
import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU; it asks when they are defined.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from peft import LoraConfig, get_peft_model
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

from phatgoose.errors import PhatgooseError
from phatgoose.experts.adapter import WEIGHTS_FILE, Adapter
from phatgoose.experts.pool import Pool
from phatgoose.experts.vectors import GateProvenance, save_gate
from phatgoose.files import sha256

PAD, EOS = 0, 1
VOCABULARY = 97
GOLDEN = Path(__file__).parent / "golden"
ModelFactory = Callable[[], PreTrainedModel]


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


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


def make_adapter(factory: ModelFactory, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """An adapter with random A and B, saved by PEFT itself."""
    model = factory()
    kind = model.config.model_type
    options = {
        "r": 8,
        "lora_alpha": 12,
        "target_modules": TARGETS[kind],
        "fan_in_fan_out": kind == "gpt2",
        "init_lora_weights": False,
        "task_type": "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    }
    torch.manual_seed(seed)
    get_peft_model(model, LoraConfig(**(options | lora))).save_pretrained(str(folder))
    return folder


def make_gate(folder: Path, seed: int = 0, scale: float = 1.0) -> Path:
    """A random gate beside an adapter."""
    generator = torch.Generator().manual_seed(1000 + seed)
    shapes = Adapter(folder).shapes
    vectors = {site: scale * torch.randn(shape.in_features, generator=generator) for site, shape in shapes.items()}
    save_gate(folder, vectors, provenance(folder))
    return folder


def provenance(folder: Path) -> GateProvenance:
    return GateProvenance(
        base="tiny",
        revision=None,
        data=None,
        adapter_sha256=sha256(folder / WEIGHTS_FILE),
        steps=0,
        learning_rate=5e-3,
        seed=0,
        settings={},
        phatgoose="test",
    )


def make_expert(factory: ModelFactory, folder: Path, seed: int = 0, **lora: Any) -> Path:
    """An adapter with a gate."""
    return make_gate(make_adapter(factory, folder, seed, **lora), seed)


def fill_pool(folder: Path, base: str, experts: Sequence[Path]) -> Pool:
    pool = Pool.create(folder, base)
    for expert in experts:
        pool.add(expert)
    return pool


def make_pool(factory: ModelFactory, folder: Path, num_experts: int = 3, **lora: Any) -> Pool:
    """A pool in `folder`/pool of experts e0, e1, ... that lie beside it."""
    experts = [make_expert(factory, folder / f"e{i}", seed=i, **lora) for i in range(num_experts)]
    return fill_pool(folder / "pool", factory().config._name_or_path, experts)


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


def make_data(file: Path, rows: int = 24, validation: int = 4, seed: int = 0) -> Path:
    """A data file of words that `make_tokenizer` knows; its last rows are of split "validation"."""
    lines = []
    for i in range(rows):
        ids = token_ids(7, seed=100 * seed + i).tolist()
        split = "validation" if i >= rows - validation else "train"
        lines.append(json.dumps({"input": as_text(ids[:5]), "target": as_text(ids[5:]), "split": split}) + "\n")
    data = "".join(lines).encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


def as_text(ids: Iterable[int]) -> str:
    return " ".join(f"<{i}>" for i in ids)


def token_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random ids, neither padding nor EOS."""
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def model_inputs(model: Any, rows: int = 2, seed: int = 0) -> dict[str, torch.Tensor]:
    """Something to call any of the models with."""
    inputs = {"input_ids": token_ids(rows, 7, seed=seed)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = token_ids(rows, 5, seed=seed + 1)
    return inputs


def files_of(folder: Path) -> dict[str, str]:
    """Every file below `folder` with its checksum (but not the lock, which is always empty)."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in files}


def fails(error: type[PhatgooseError], *words: str, action: Callable[[], Any]) -> PhatgooseError:
    """Check that `action` raises exactly `error`, with all `words` in what people read."""
    with pytest.raises(PhatgooseError) as caught:
        action()
    assert type(caught.value) is error, caught.value
    for word in words:
        assert word in str(caught.value)
    return caught.value


def assert_close(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    """Equal within `relative` of the largest magnitude that is expected."""
    assert found.shape == expected.shape
    difference = (found.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    assert difference <= relative * largest, f"off by {difference:.3g}, largest value {largest:.3g}"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data, which is not in this repository; without it, its tests are skipped, but not in CI."""
    folder = Path(os.environ.get("PHATGOOSE_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        reason = f"there is no {folder}: set PHATGOOSE_DATA to the folder with t0hi, t0ho and bbh"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A real Chromium; without one, its tests are skipped, but not in CI."""
    from playwright.sync_api import sync_playwright

    executable = shutil.which("chromium")
    if executable is None:
        reason = "there is no chromium: apt-get install chromium"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield browser
        browser.close()


def contrast(first: Sequence[int], second: Sequence[int]) -> float:
    """Contrast ratio of WCAG 2."""

    def luminance(rgb: Sequence[int]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)
