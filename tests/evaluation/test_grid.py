"""Grids: what a cell's score is, and what a results folder holds after runs, kills and repetitions."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import evaluator
from peft import PeftModel

from helpers.checks import files_of
from helpers.cli import run, succeed
from helpers.grids import ROWS, SEPARATOR, grid, make_grid, rows_of
from helpers.models import llama, make_tokenizer
from phatgoose.config import EvaluationConfig, GenerationConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.evaluation.grid import evaluate, plan
from phatgoose.evaluation.harness import RoutedLM
from phatgoose.evaluation.methods import parse_methods
from phatgoose.evaluation.suites import load_tasks
from phatgoose.evaluation.suites.metrics import rouge_l
from phatgoose.experts.pool import Pool
from phatgoose.inference.generation import answer
from phatgoose.results.reader import read_results
from phatgoose.results.writer import ResultsFolder
from phatgoose.routing.linear import RoutedLinear
from phatgoose.routing.model import RoutedModel

LONG = 80  # rows that take long enough to be killed in between


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_grid(tmp_path_factory.mktemp("template"))


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "here"))
    return tmp_path / "here"


def make_encoder(model: Any) -> Encoder:
    return Encoder(make_tokenizer(), model.config, TextConfig(separator=SEPARATOR))


@torch.no_grad()
def plain_scores(model: Any, file: Path, *, split: str | None = None) -> list[float]:
    """Rank classification: one request at a time, one pass each, without padding or caches."""
    coder, scores = make_encoder(model), []
    with gzip.open(file, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    for row in rows:
        if split is not None and row["split"] != split:
            continue
        means = []
        for choice in row["choices"]:
            prompt, target = coder.prompt(row["input"]), coder.target(choice)
            logits_SV = model(input_ids=torch.tensor([[*prompt, *target]])).logits[0, len(prompt) - 1 : -1]
            losses_S = -logits_SV.double().log_softmax(dim=-1)[torch.arange(len(target)), torch.tensor(target)]
            means.append(losses_S.mean().item())
        right = row["target"] if "target" in row else row["choices"][row["label"]]
        scores.append(float(row["choices"][means.index(min(means))] == right))
    assert 0 < sum(scores) < len(scores)
    return scores


def scores_of(folder: Path, row: dict[str, Any]) -> list[float]:
    found: list[float] = json.loads((folder / row["examples"]).read_text())["scores"]
    return found


def test_a_grid_end_to_end(here: Path) -> None:
    out = succeed(*grid("phatgoose,arrow top_k=1,base,expert:e1", seed="0,3"))
    assert "next: phatgoose compare out" in out
    rows = rows_of(here / "out")
    assert [(row["method"], row["task"], row["seed"]) for row in rows] == [
        (method, task, seed)
        for seed in (0, 3)
        for method in ("phatgoose", "arrow top_k=1", "base", "expert:e1")
        for task in ("rte", "cb")
    ]
    pool = Pool.open("pool")
    models: dict[str, Any] = {
        "phatgoose": RoutedModel.from_pool(llama(), pool),
        "arrow top_k=1": RoutedModel.from_pool(llama(), pool, router="arrow", top_k=1),
        "base": llama(),
        "expert:e1": RoutedModel.from_pool(llama(), pool.subset(["e1"]), top_k=1),
    }
    for row in rows:
        expected = plain_scores(models[row["method"]], here / "data" / "t0ho" / "rendered" / f"{row['task']}.jsonl.gz")
        assert scores_of(here / "out", row) == expected
        assert row["score"] == pytest.approx(sum(expected) / ROWS)
        ids = json.loads((here / "out" / row["examples"]).read_text())["example_ids"]
        assert ids == [f"{row['task']}/{i // 2}" for i in range(ROWS)]
    first = rows[2]
    assert (first["format"], first["suite"], first["metric"], first["num_rows"], first["limit"]) == (
        1, "t0ho", "accuracy", ROWS, None
    )  # fmt: skip
    assert (first["pool"], first["pool_name"], first["base"]) == (pool.fingerprint, "pool", "tiny-llama")
    assert first["config"]["router"] == "arrow" and first["config"]["top_k"] == 1
    assert first["text"] == {"separator": SEPARATOR, "max_input_tokens": 512, "max_target_tokens": 512}
    assert set(first["versions"]) == {"phatgoose", "torch", "transformers", "peft", "lm_eval"}
    results, warnings = read_results(["out"])
    assert len(results) == len(rows) and not warnings


def test_written_answers(here: Path) -> None:
    succeed(*grid("phatgoose", suite="bbh,held-in", task="object_counting,e1", limit=4))
    model = RoutedModel.from_pool(llama(), Pool.open("pool"))
    coder = make_encoder(model)
    tasks = load_tasks(["bbh", "held-in"], model.pool, data=here / "data", names=["object_counting", "e1"], limit=4)
    for row, task, length in zip(rows_of(here / "out"), tasks, (8, 128), strict=True):
        written = [answer(model, coder, r.input, GenerationConfig(max_new_tokens=length)).text for r in task.rows]
        expected = (
            [float(text in r.targets) for text, r in zip(written, task.rows, strict=True)]
            if task.name == "object_counting"
            else [rouge_l(text, r.targets) for text, r in zip(written, task.rows, strict=True)]
        )
        assert scores_of(here / "out", row) == expected and row["metric"] == task.measure
    assert row["metric"] == "rouge_l" and row["score"] > 0


def test_own_expert_and_leave_one_out(here: Path) -> None:
    """Masking an expert is as good as a pool without it."""
    succeed(*grid("phatgoose,own,experts", suite="held-in,leave-one-out", task="e0"))
    rows = {(row["suite"], row["method"]): row for row in rows_of(here / "out")}
    methods = ["phatgoose", "own", "expert:e0", "expert:e1", "expert:e2"]
    absent = {("leave-one-out", "own"), ("leave-one-out", "expert:e0")}  # the own expert is masked there
    assert set(rows) == {(suite, method) for suite in ("held-in", "leave-one-out") for method in methods} - absent
    pool, file = Pool.open("pool"), here / "data" / "t0hi" / "e0.jsonl.gz"
    found = {key: scores_of(here / "out", row) for key, row in rows.items()}
    own = plain_scores(RoutedModel.from_pool(llama(), pool.subset(["e0"]), top_k=1), file, split="validation")
    assert found["held-in", "own"] == found["held-in", "expert:e0"] == own
    assert rows["held-in", "own"]["config"] == {"router": "own"}
    others = RoutedModel.from_pool(llama(), pool.subset(["e1", "e2"]))
    assert found["leave-one-out", "phatgoose"] == plain_scores(others, file, split="validation")
    assert found["held-in", "phatgoose"] != found["leave-one-out", "phatgoose"]
    assert found["leave-one-out", "expert:e1"] == found["held-in", "expert:e1"]


def test_chance_runs_no_model(here: Path) -> None:
    """The share of right choices, and nothing for a written answer."""
    succeed(*grid("chance", suite="t0ho,bbh", task="rte,object_counting", limit=4))
    choices, written = rows_of(here / "out")
    assert scores_of(here / "out", written) == [0.0] * 4 and written["score"] == 0
    task = load_tasks(["t0ho"], Pool.open("pool"), data=here / "data", names=["rte"], limit=4)[0]
    assert scores_of(here / "out", choices) == [1 / len(row.choices or ()) for row in task.rows]
    assert choices["method"] == "chance" and 0 < choices["score"] < 1


def test_a_masked_expert_carries_nothing(here: Path) -> None:
    pool = Pool.open("pool")
    tasks = load_tasks(["held-in", "leave-one-out"], pool, data=here / "data", names=["e0"])
    methods = parse_methods(["phatgoose", "expert:e1"], pool)
    cells = plan(tasks, methods, [0], base="tiny-llama", dtype="fp32", limit=None, text=TextConfig())
    assert [(cell.task.suite, cell.method.name, cell.masked) for cell in cells] == [
        ("held-in", "phatgoose", ()),
        ("leave-one-out", "phatgoose", ("e0",)),
        ("held-in", "expert:e1", ()),
        ("leave-one-out", "expert:e1", ()),
    ]
    model = RoutedModel.from_pool(llama(), pool)
    for cell, is_zero in zip(cells[:2], (False, True), strict=True):
        lm = RoutedLM(model, make_encoder(model), batch_tokens=1, without={cell.task.task_name: cell.masked})
        with model.trace() as trace:
            evaluator.evaluate(lm, {"tasks": {cell.task.task_name: cell.task}}, bootstrap_iters=0)
        weights_BSE = torch.cat([trace.weights(site) for site in trace.sites])
        assert (weights_BSE[..., 0].sum() == 0) == is_zero
        assert (weights_BSE.sum(dim=-1) - 1).abs().max() < 1e-5


def test_a_repeated_run_costs_nothing(here: Path) -> None:
    succeed(*grid("phatgoose,merged"))
    before = files_of(here / "out")
    shutil.rmtree(here / "tiny-llama")  # nothing is loaded
    result = run(*grid("phatgoose,merged"))
    assert result.code == 0 and "4 cells, 4 of them there already" in result.err
    assert files_of(here / "out") == before
    assert run(*grid("phatgoose,merged,base")).code == 2  # this one is


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_grid(tmp_path, rows=LONG))
    arguments = ("phatgoose,merged,base,uniform,experts",)
    succeed(*grid(*arguments, out="whole"))
    whole = rows_of(tmp_path / "whole")
    with subprocess.Popen(
        [sys.executable, "-m", "phatgoose", *grid(*arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        lines, end = tmp_path / "out" / "rows.jsonl", time.monotonic() + 300
        while process.poll() is None and time.monotonic() < end and not (lines.is_file() and lines.stat().st_size):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    finished = rows_of(tmp_path / "out")
    assert 0 < len(finished) < len(whole) == 14
    with lines.open("a") as file:  # as if it had been killed within the next line
        file.write(lines.read_text().splitlines()[0][:100])
    last = tmp_path / "out" / whole[-1]["examples"]
    last.parent.mkdir(parents=True, exist_ok=True)
    (last.parent / f".{last.name}.cut").write_text("[0.0, ")
    result = run(*grid(*arguments))
    assert result.code == 0 and f"14 cells, {len(finished)} of them there already" in result.err
    assert rows_of(tmp_path / "out") == whole
    assert files_of(tmp_path / "out" / "examples") == files_of(tmp_path / "whole" / "examples")


def test_chunks_and_batches_change_nothing(here: Path) -> None:
    succeed(*grid("phatgoose"))
    succeed(*grid("phatgoose", out="alone", batch_tokens=1, answer_tokens=1))
    pool, model = Pool.open("pool"), llama()
    tasks, methods = (
        load_tasks(["t0ho"], pool, data=here / "data", names=["rte", "cb"]),
        parse_methods(["phatgoose"], pool),
    )
    text = TextConfig(separator=SEPARATOR)
    cells = plan(tasks, methods, [0], base="tiny-llama", dtype="fp32", limit=None, text=text)
    folder = ResultsFolder(here / "chunks", pool.fingerprint)
    evaluate(cells, model, make_encoder(model), pool, folder, EvaluationConfig(chunk_requests=1))
    assert not any(isinstance(module, RoutedLinear) for module in model.modules())  # as it was
    assert rows_of(here / "out") == rows_of(here / "alone") == rows_of(here / "chunks")


def test_a_limit_is_the_same_rows_for_all(here: Path) -> None:
    succeed(*grid("phatgoose,base", limit=5, seed="0,1"))
    rows = [row for row in rows_of(here / "out") if row["task"] == "rte"]
    assert len({row["data"] for row in rows}) == 1 and {row["num_rows"] for row in rows} == {5}
    ids = [json.loads((here / "out" / row["examples"]).read_text())["example_ids"] for row in rows]
    assert ids == [ids[0]] * 4 and rows[0]["limit"] == 5


def test_multitask_is_an_adapter_outside_the_pool(here: Path) -> None:
    """Alone for everything; not in leave-one-out, whose datasets it was trained on."""
    succeed(*grid("phatgoose,multitask:bare", suite="t0ho,leave-one-out", task="rte,e0"))
    rows = rows_of(here / "out")
    assert [(row["suite"], row["method"]) for row in rows] == [
        ("t0ho", "phatgoose"),
        ("leave-one-out", "phatgoose"),
        ("t0ho", "multitask"),
    ]
    peft = PeftModel.from_pretrained(llama(), here / "bare").eval()
    assert scores_of(here / "out", rows[2]) == plain_scores(peft, here / "data" / "t0ho" / "rendered" / "rte.jsonl.gz")
    assert rows[2]["config"]["pool"] == Pool.around(here / "bare").fingerprint != rows[2]["pool"]
    assert not (here / "pool.json").exists()
    succeed(*grid("multitask:bare"))
    assert run(*grid("multitask:tiny-llama")).code == 2


def test_results_can_be_compared(here: Path) -> None:
    """From pools to the table, with Oracle and Best Individual."""
    succeed(*grid("phatgoose,arrow,experts"))
    compared = json.loads(succeed("compare", "out", "--resamples", 200, "--json"))
    (suite,) = compared["suites"]
    assert suite["averages"].keys() >= {"phatgoose", "arrow", "Oracle", "Best Individual"}
    means = {row["method"]: [] for row in rows_of(here / "out")}
    for row in rows_of(here / "out"):
        means[row["method"]].append(row["score"])
    for method, scores in means.items():
        if method in suite["averages"]:
            assert suite["averages"][method]["score"] == pytest.approx(sum(scores) / len(scores))
    best = [max(scores) for scores in zip(*(v for m, v in means.items() if m.startswith("expert:")), strict=True)]
    assert suite["averages"]["Oracle"]["score"] == pytest.approx(sum(best) / len(best))
    assert "Best Individual" in (here / "out" / "comparison.html").read_text(encoding="utf-8")
