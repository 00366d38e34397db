"""Running commands, and a folder with all that the commands in tests need."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers.data import as_text, make_data
from helpers.golden import GOLDEN
from helpers.models import llama, make_base, t5
from helpers.pools import make_adapter, make_expert, make_pool
from phatgoose.cli import main
from phatgoose.experts.pool import Pool

CHECKPOINT = str(GOLDEN / "official_checkpoint.pt")
PROMPT = as_text([5, 6, 7])
SHORT = ("--max-new-tokens", "3")


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*args: object) -> Result:
    """What the command `phatgoose` does, in this process."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["phatgoose", *map(str, args)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = argv
    return Result(int(end.value.code or 0), out.getvalue(), err.getvalue())


def succeed(*args: object) -> str:
    result = run(*args)
    assert result.code == 0, result.err
    return result.out


def make_workshop(folder: Path) -> Path:
    """Bases tiny-llama and tiny-t5, data, experts, and pools: good, empty, without a gate, damaged."""
    make_base(llama, folder / "tiny-llama")
    make_base(t5, folder / "tiny-t5")
    make_data(folder / "data.jsonl")
    make_pool(llama, folder, 2)
    make_adapter(llama, folder / "bare", seed=7)
    make_expert(t5, folder / "of-t5", seed=8)
    Pool.create(folder / "empty", "tiny-llama")
    shutil.copytree(folder / "pool", folder / "gateless")
    Pool.open(folder / "gateless").add(folder / "bare")
    shutil.copytree(folder / "pool", folder / "damaged")
    (folder / "damaged" / "experts" / "e1" / "gate.safetensors").write_bytes(b"cut short")
    return folder


def make_broken_bases(folder: Path) -> None:
    """tiny-llama, but with a layer too few, half a file of weights, and no tokenizer."""
    thin, cut, mute = (
        Path(shutil.copytree(folder / "tiny-llama", folder / how / "tiny-llama")) for how in ("thin", "cut", "mute")
    )
    config = (thin / "config.json").read_text()
    (thin / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    os.truncate(cut / "model.safetensors", 1000)
    (mute / "tokenizer.json").write_text("{")
