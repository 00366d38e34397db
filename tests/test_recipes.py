"""The recipes, from raw files to scores, at tiny size."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import runpy
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.checks import fails, files_of
from helpers.data import as_text, encoder_of, make_data, token_ids
from helpers.grids import make_grid
from helpers.models import llama, make_base, make_tokenizer
from helpers.training import GATE, LORA, make_jobs
from phatgoose.config import TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.errors import ConfigError
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.results.reader import read_results
from phatgoose.training.group.train import train_gates
from phatgoose.training.lora import lora_layers, new_lora
from phatgoose.training.run import describe, resumes
from phatgoose.training.trainer import make_trainer

pytestmark = pytest.mark.slow

RECIPES = Path(__file__).parent.parent / "recipes"
METHODS = {"base", "own expert", "top-1", "top-2", "left out"}


def write_choices(file: Path) -> None:
    """A dataset of questions with two answers."""
    rows = []
    for i in range(16):
        question, answers = token_ids(5, seed=i).tolist(), ["<10> <11>", "<12>"]
        split = "validation" if i >= 12 else "train"
        row = {"input": as_text(question), "target": answers[i % 2], "choices": answers, "split": split}
        rows.append(json.dumps(row) + "\n")
    file.write_bytes(gzip.compress("".join(rows).encode()))


def times(folder: Path) -> dict[Path, int]:
    """When each file was written last, but for the scores."""
    return {
        path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file() and path.name != "scores.json"
    }


def test_demo_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = make_base(llama, tmp_path / "tiny-llama"), tmp_path / "out"
    make_data(tmp_path / "words.jsonl.gz", rows=16)
    write_choices(tmp_path / "answers.jsonl.gz")
    options = {
        "--data": tmp_path, "--out": out, "--base": base, "--rank": 2, "--steps": 4, "--gate-steps": 3,
        "--batch-size": 4, "--dtype": "fp32", "--jobs": 1, "--examples": 3,
    }  # fmt: skip
    args = [str(RECIPES / "demo_pool.py"), *(str(part) for pair in options.items() for part in pair)]
    args += ["--datasets", "words", "answers"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in this process, so that sums round alike
    first = subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=300, check=False)
    assert first.returncode == 0, first.stderr
    assert "words: adapter and gate are done" in first.stdout

    pool = Pool.open(out / "pool")
    assert pool.names == ("words", "answers")
    assert pool.check(llama()) == []
    assert all(expert.has_gate for expert in pool.experts())
    assert {path.name for path in (out / "experts").iterdir()} == {"words", "answers"}  # no work folder is left
    scores = json.loads((out / "scores.json").read_text())
    for name in ("words", "answers"):
        assert set(scores[name]) == METHODS
        for found in scores[name].values():
            assert found["num_examples"] == 3
            assert (found["accuracy"] is None) == (name == "words")
    assert scores["words"]["base"]["loss"] != scores["words"]["own expert"]["loss"]

    before = times(out)
    monkeypatch.setattr(sys, "argv", args)
    monkeypatch.syspath_prepend(RECIPES)
    runpy.run_path(args[0], run_name="__main__")
    assert "are done" not in capsys.readouterr().out
    assert times(out) == before
    assert json.loads((out / "scores.json").read_text()) == scores


def test_demo_score(monkeypatch: pytest.MonkeyPatch) -> None:
    """One mean over all target tokens, not a mean of the examples' means; accuracy over those with choices."""
    monkeypatch.syspath_prepend(RECIPES)
    score = importlib.import_module("demo_scores").score
    model = llama()
    encoder = Encoder(make_tokenizer(), model.config, TextConfig())
    short, long = Example(input="<5>", target=""), Example(input="<5>", target=as_text(token_ids(20, seed=1).tolist()))
    one, other, both = (score(model, encoder, some, batch_tokens=99) for some in ([short], [long], [short, long]))
    assert both.loss == pytest.approx((one.loss + 21 * other.loss) / 22, rel=1e-5)
    assert not math.isclose(both.loss, (one.loss + other.loss) / 2, rel_tol=1e-3)
    assert (both.accuracy, both.num_examples, both.num_choices) == (None, 2, 0)

    texts = [as_text(token_ids(1 + i % 3, seed=i).tolist()) for i in range(24)]
    asked = [Example(input=texts[i], target=texts[i + 1], choices=tuple(texts[i + 1 : i + 4])) for i in range(20)]
    means = [
        score(model, encoder, [replace(row, target=c)], batch_tokens=99).loss for row in asked for c in row.choices
    ]
    right = [means[i] == min(means[i : i + 3]) for i in range(0, len(means), 3)]
    assert 0 < sum(right) < len(right)  # else accuracy says nothing
    whole = score(model, encoder, [short, *asked, long], batch_tokens=99)
    assert (whole.accuracy, whole.num_examples, whole.num_choices) == (sum(right) / len(right), 22, 20)


class JointLinear(torch.nn.Module):
    """PEFT's layer with a gate that is trained together with it, after the formula."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer
        self.gate_I = torch.nn.Parameter(torch.zeros(layer.get_base_layer().in_features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b, scaling = (getattr(self.layer, name)["default"] for name in ("lora_A", "lora_B", "scaling"))
        return self.layer.get_base_layer()(x) + scaling * b(a(x)) * torch.sigmoid((x @ self.gate_I).unsqueeze(-1))


def test_joint_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapter and gate end as if Trainer had trained them together, each expert alone."""
    monkeypatch.syspath_prepend(RECIPES / "ocean")
    train = partial(importlib.import_module("joint_gates").train_jointly, config=LORA, progress=False)
    jobs = make_jobs(tmp_path / "many", validation=0)
    train(llama(), make_tokenizer(), jobs)
    for job in jobs:
        model = llama()
        encoder = encoder_of(model)

        def collate(rows: Any, encoder: Any = encoder) -> Any:
            batch = encoder.collate(rows)
            batch["targets"] = batch.pop("labels")
            return batch

        with new_lora(model, LORA) as peft_model:
            layers = lora_layers(peft_model)
            for site, layer in layers.items():
                model.set_submodule(site, JointLinear(layer))
            rows = [encoder.encode(example) for example in job.examples]
            make_trainer(
                peft_model, LORA, tmp_path / "work", save_steps=10**6, dataset=rows, validation=[], collate=collate
            ).train()
            expert, gate = Expert(job.folder), Expert(job.folder).load_gate()
            loaded = dict(expert.adapter.load())
            assert gate.keys() == loaded.keys() == layers.keys()
            for site, layer in layers.items():
                gate_I = model.get_submodule(site).gate_I
                assert gate_I.abs().max() > 0
                torch.testing.assert_close(gate[site], gate_I.detach(), rtol=0, atol=1e-5)
                torch.testing.assert_close(
                    loaded[site].b_OR, layer.lora_B["default"].weight.detach(), rtol=0, atol=1e-5
                )
                model.set_submodule(site, layer)
    kept = Expert(jobs[0].folder).load_gate()
    # the gates are there, so none is trained after the adapters
    before = files_of(tmp_path / "many")
    train_gates(llama(), make_tokenizer(), jobs, config=GATE, progress=False)
    assert files_of(tmp_path / "many") == before
    settings = json.loads((jobs[0].folder / "gate_config.json").read_text())["settings"]
    assert settings["training"] == asdict(LORA) | {"joint_gates": True}
    # a run that was killed between an adapter and its gate has left its work folder
    (jobs[0].folder / "gate.safetensors").unlink()
    run = train.func.__globals__["JointRun"](llama(), make_tokenizer(), LORA)
    work = jobs[0].work(".training")
    work.mkdir()
    described = describe(LORA, TextConfig(), llama(), data=None, validation=None, joint_gates=True)
    described["experts"] = {jobs[0].name: run.describe_job(jobs[0])}
    (work / "run.json").write_text(json.dumps(described))
    fails(ConfigError, "joint_gates: True", action=lambda: resumes(work, described | {"joint_gates": False}))
    train(llama(), make_tokenizer(), jobs)
    expert = Expert(jobs[0].folder)
    # alone, the first expert trains as in its group, but for rounding
    torch.testing.assert_close(expert.load_gate(), kept, rtol=0, atol=1e-5)
    assert not work.exists()


def test_ocean(tmp_path: Path) -> None:
    """Two experts, two seeds, one task of each held-out suite; in two parts, as on two machines."""
    grid = make_grid(tmp_path / "grid", rows=6)
    out = tmp_path / "out"
    options = {
        "--data": grid / "data", "--out": out, "--base": grid / "tiny-llama", "--rank": 2, "--steps": 4,
        "--gate-steps": 2, "--most-gate-steps": 3, "--batch-size": 2, "--multitask-steps": 4,
        "--multitask-batch-size": 4, "--prototype-examples": 3, "--rows": 3, "--recorded-rows": 2, "--dtype": "fp32",
        "--batch-tokens": 512,
    }  # fmt: skip
    args = [sys.executable, str(RECIPES / "ocean"), *(str(part) for pair in options.items() for part in pair)]
    args += ["--seeds", "0", "1", "--tasks", "rte", "object_counting", "e0", "e1"]
    for some in (["--stages", "train", "--seeds", "0"], []):
        done = subprocess.run([*args, *some], capture_output=True, text=True, timeout=500, check=False)
        assert done.returncode == 0, done.stderr

    for path in (out / "seed-0", out / "seed-1", out / "seed-0" / "gates-10", out / "seed-0" / "joint"):
        pool = Pool.open(path / "pool")
        assert pool.names == ("e0", "e1")
        assert pool.check(llama()) == []
        needs = ("activations", "embeddings", "gate") if path.name.startswith("seed") else ("gate",)
        assert all(expert.brings(need) for expert in pool.experts() for need in needs)
    same = [out / "seed-0" / name / "experts" / "e0" / WEIGHTS_FILE for name in ("", "gates-10", "joint")]
    assert same[0].read_bytes() == same[1].read_bytes() != same[2].read_bytes()

    results, warnings = read_results(sorted((out / "rows").glob("seed-*-results.tar.xz")))
    assert not warnings
    cells = {(r.suite, r.task, r.method) for r in results if r.seed == 1}
    methods = {method for _, _, method in cells}
    assert {"base", "own", "multitask", "phatgoose", "phatgoose-prior", "expert:e0", "expert:e1"} <= methods
    # both tasks of the suites over the pool's datasets, one each of the paper's
    assert {cell[:2] for cell in cells if cell[2] == "phatgoose"} == {
        ("t0ho", "rte"), ("bbh", "object_counting"), ("held-in", "e0"), ("held-in", "e1"),
        ("leave-one-out", "e0"), ("leave-one-out", "e1"),
    }  # fmt: skip
    assert "phatgoose top_k=1" in {r.method for r in results if r.seed == 0}
    assert "phatgoose top_k=1" not in methods
    comparison, settings = ((out / f"{name}.md").read_text().replace("\\", "") for name in ("comparison", "settings"))
    assert "| phatgoose-prior |" in comparison
    assert not [name for name in ("top_k=", "temperature=", "_scale=", "gates-10") if name in comparison]
    for name in ("top_k=1", "temperature=2.0", "phatgoose-raw", "phatgoose (gates-10)", "phatgoose (joint)"):
        assert name in settings
    tables = (out / "tables.md").read_text().splitlines()
    assert "## All settings, tasks with choices, one seed" in tables
    assert "### held-in: averages" in tables
    assert (out / "analysis-phatgoose" / "analysis.html").is_file()

    some = ["--stages", "tables", "--packed", str(out / "rows"), "--out", str(tmp_path / "some"), "--seeds", "1"]
    some += ["--routers", "base", "phatgoose", "--tasks", "e0"]
    done = subprocess.run([sys.executable, str(RECIPES / "ocean"), *some], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    comparison = (tmp_path / "some" / "comparison.md").read_text()
    assert "held-in (1 task)" in comparison and "| base |" in comparison and "rte" not in comparison
    assert "arrow" not in comparison and "expert:" not in comparison

    before = times(out)
    again = [*args, "--stages", "train", "variants", "evaluate", "record"]
    done = subprocess.run(again, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    after = times(out)
    assert {path.name for path in before if before[path] != after[path]} == {"times.jsonl"}


def test_published_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables beside the published rows are those that the recipe makes of these rows, byte for byte."""
    monkeypatch.syspath_prepend(RECIPES / "ocean")
    tables = importlib.import_module("tables")
    rows = RECIPES.parent / "benchmarks" / "rows" / "ocean"
    results = tables.read(tables.archives_of(rows, (0, 1, 2)))
    wanted = {name: table for name, table in tables.tables_of(results, rows, 0).items() if name in tables.SECTIONS}
    assert wanted.keys() == tables.SECTIONS.keys()
    compared = {name: tables.compared_of(name, table) for name, table in wanted.items()}
    assert (rows / "tables.md").read_text(encoding="utf-8") == tables.joined(compared)
