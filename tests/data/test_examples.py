"""Examples from files, and what a model reads of them."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from helpers.checks import fails
from helpers.data import as_text, token_ids
from helpers.models import EOS, MODELS, PAD, llama, make_tokenizer, t5
from phatgoose.config import TextConfig
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example, fingerprint, read_examples
from phatgoose.errors import DataError

ROWS = [
    {"input": "eins", "target": "zwei", "split": "train"},
    {"input": "größer 鹅", "target": "", "split": "test", "choices": ["", "x"]},
    {"input": "", "target": "drei", "other": [1, 2]},
]
EXAMPLES = [
    Example(input="eins", target="zwei"),
    Example(input="größer 鹅", target="", choices=("", "x")),
    Example(input="", target="drei"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"data{suffix}"
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    path.write_bytes(gzip.compress(text) if suffix.endswith(".gz") else text)
    assert read_examples(str(path)) == EXAMPLES
    assert read_examples(str(path), "train") == [EXAMPLES[0], EXAMPLES[2]]  # no split: always in
    assert read_examples(str(path), "test") == [EXAMPLES[1], EXAMPLES[2]]


def test_no_row_of_a_split(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text(json.dumps(ROWS[0]))
    fails(DataError, "no examples", "'test'", action=lambda: read_examples(str(tmp_path / "data.jsonl"), "test"))


def test_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    good, other = tmp_path / "good", tmp_path / "other"
    for folder, row in ((good, {"input": "a", "target": "b", "choices": ["b", "c"]}), (other, {"text": "a"})):
        folder.mkdir()
        (folder / "train.jsonl").write_text(json.dumps(row))
    assert read_examples(str(good)) == [Example(input="a", target="b", choices=("b", "c"))]
    fails(DataError, "row 0", "'input'", "text", action=lambda: read_examples(str(other)))
    fails(DataError, "validation", action=lambda: read_examples(str(good), "validation"))
    fails(DataError, "none", action=lambda: read_examples(str(tmp_path / "none")))


def test_fingerprint() -> None:
    changed = [
        [*EXAMPLES[:2]],
        EXAMPLES[::-1],
        [replace(EXAMPLES[0], input="eins "), *EXAMPLES[1:]],
        [EXAMPLES[0], replace(EXAMPLES[1], choices=None), EXAMPLES[2]],
        [Example(input="einszwei", target=""), *EXAMPLES[1:]],
    ]
    assert fingerprint(EXAMPLES) == fingerprint([replace(example) for example in EXAMPLES])
    assert len({fingerprint(examples) for examples in [EXAMPLES, *changed]}) == 6


def encoder(model: Any, bos: int | None = None, closes: bool = False, **text: Any) -> Encoder:
    """An encoder whose tokenizer may begin a text with a BOS, and close it with EOS."""
    tokenizer = make_tokenizer()
    template = f"<{bos}> $A" if bos is not None else "$A"
    if closes:
        template += f" <{EOS}>"
    special = [(f"<{i}>", i) for i in (bos, EOS) if i is not None]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    if bos is not None:
        tokenizer.bos_token = f"<{bos}>"
    return Encoder(tokenizer, model.config, TextConfig(**({"separator": " <90> "} | text)))


EXAMPLE = Example(input="<11> <12> <13>", target="<21> <22>")


def test_decoder_only_row() -> None:
    """labels[t] is what comes after input_ids[t], and only the target and EOS count."""
    row = encoder(llama()).encode(EXAMPLE)
    assert row["input_ids"] == [11, 12, 13, 90, 21, 22]
    assert row["labels"] == [IGNORED, IGNORED, IGNORED, 21, 22, EOS]
    assert encoder(llama(), bos=2, closes=True).encode(EXAMPLE)["input_ids"] == [2, 11, 12, 13, 90, 21, 22]


def test_encoder_decoder_row() -> None:
    row = encoder(t5(), closes=True).encode(EXAMPLE)
    assert row["input_ids"] == [11, 12, 13, EOS]
    assert row["decoder_input_ids"] == [PAD, 21, 22]
    assert row["labels"] == [21, 22, EOS]


def test_long_texts_are_cut() -> None:
    long = Example(input=as_text(range(10, 30)), target=as_text(range(50, 70)))
    limits = {"max_input_tokens": 4, "max_target_tokens": 3}
    row = encoder(llama(), **limits).encode(long)
    assert row == {"input_ids": [27, 28, 29, 90, 50, 51], "labels": [IGNORED] * 3 + [50, 51, EOS]}
    assert encoder(llama(), bos=2, **limits).prompt(long.input) == [2, 28, 29, 90]  # at the front, but BOS stays
    row = encoder(t5(), closes=True, **limits).encode(long)
    assert row["input_ids"] == [10, 11, 12, EOS]  # at the end, but EOS stays
    assert row["labels"] == [50, 51, EOS]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("target", ["", "<21>"])
def test_empty_input(kind: str, target: str) -> None:
    """There is always something to answer to, so that every target token is predicted."""
    model = MODELS[kind]()
    row = encoder(model, separator="").encode(Example(input="", target=target))
    labels = [i for i in row["labels"] if i != IGNORED]
    assert labels == ([21, EOS] if target else [EOS])
    assert len(row["labels"]) == len(row.get("decoder_input_ids", row["input_ids"]))
    assert len(row["input_ids"]) >= 1


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_is_its_rows(kind: str) -> None:
    """Padding changes no logit of any example."""
    model = MODELS[kind]()
    coder = encoder(model)
    lengths = [(3, 5), (8, 1), (1, 9)]
    rows = [
        coder.encode(Example(input=as_text(token_ids(n).tolist()), target=as_text(token_ids(m, seed=1).tolist())))
        for n, m in lengths
    ]
    batch = coder.collate(rows)
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for i, row in enumerate(rows):
            alone = coder.collate([row])
            count = len(row["labels"])
            assert labels[i, :count].tolist() == row["labels"]
            assert (labels[i, count:] == IGNORED).all()
            del alone["labels"]
            torch.testing.assert_close(together[i, :count], model(**alone).logits[0], atol=1e-5, rtol=1e-5)


def test_tokenizer_without_eos() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    fails(DataError, "EOS", action=lambda: Encoder(tokenizer, llama().config, TextConfig()))
