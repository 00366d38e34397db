"""Token ids, texts, examples and data files that the tiny models can read."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from helpers.models import VOCABULARY, make_tokenizer
from phatgoose.config import TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example


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


def make_examples(number: int, seed: int, longest: int = 9) -> list[Example]:
    """Inputs and targets of 1 to `longest` tokens."""
    lengths = torch.randint(1, longest + 1, (number, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    ids = token_ids(number, 2, longest, seed=seed).tolist()
    return [
        Example(input=as_text(row[0][:n]), target=as_text(row[1][:m])) for row, (n, m) in zip(ids, lengths, strict=True)
    ]


def encoder_of(model: Any) -> Encoder:
    return Encoder(make_tokenizer(), model.config, TextConfig())
