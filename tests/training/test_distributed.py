"""Training in two processes, as on two GPUs: our part is who writes the files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.checks import assert_close
from helpers.data import as_text, token_ids
from helpers.models import llama, make_tokenizer
from helpers.pools import fill_pool, make_adapter
from phatgoose.experts.pool import Pool


def run(*command: str) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_train_one_gate_in_a_pool(tmp_path: Path) -> None:
    """Two processes with a batch each are one process that accumulates two batches."""
    base, data = tmp_path / "tiny-llama", tmp_path / "data.jsonl"
    llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    rows = [{"input": as_text(token_ids(6, seed=i)), "target": as_text(token_ids(3, seed=99 + i))} for i in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    adapter = make_adapter(llama, tmp_path / "e0")
    gates = []
    for name, command, options in (
        ("two", [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2"], []),
        ("one", [sys.executable], ["--accumulation", "2"]),
    ):
        pool = fill_pool(tmp_path / name, str(base), [adapter])
        expert = str(pool.folder / "experts" / "e0")
        settings = [
            "--base",
            str(base),
            "--steps",
            "5",
            "--batch-size",
            "4",
            "--learning-rate",
            "0.05",
            "--warmup-ratio",
            "0",
        ]
        run(*command, "-m", "phatgoose", "gate", expert, "--data", str(data), "--device", "cpu", *settings, *options)
        pool = Pool.open(pool.folder)
        assert pool.check() == []
        assert pool.names == ("e0",)
        gates.append(pool.expert("e0").load_gate())
    two, one = gates
    assert two.keys() == one.keys()
    assert max(v.abs().max().item() for v in two.values()) > 0.1  # five steps of AdamW at 0.05
    for site, v in one.items():
        # AdamW divides by the gradient's size, so rounding of the smallest gradients shows
        assert_close(two[site], v, relative=1e-3)
        assert torch.isfinite(v).all()
