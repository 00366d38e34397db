"""lm-eval's own tasks on a pool, and the requests of ours."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from helpers.checks import fails
from helpers.cli import run
from helpers.data import as_text, token_ids
from helpers.models import MODELS, llama, make_base, make_tokenizer
from helpers.pools import make_pool
from phatgoose.config import TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import BaseModelError, ConfigError, RouterError
from phatgoose.evaluation.harness import PoolLM, RoutedLM
from phatgoose.evaluation.suites import TASKS
from phatgoose.inference.generation import GenerationConfig, answer
from phatgoose.inference.scoring import target_losses
from phatgoose.routing.model import RoutedModel

KINDS = ["llama", "t5"]
TEXTS = [as_text(token_ids(1 + 2 * i, seed=i).tolist()) for i in range(9)]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)  # type: ignore[arg-type]


def make_encoder(model: Any) -> Encoder:
    return Encoder(make_tokenizer(), model.config, TextConfig(separator=" <3> "))


def mean_loss(model: Any, coder: Encoder, prompt: str, target: str) -> float:
    pair = coder.prompt(prompt), coder.target(target)
    return target_losses(model, coder, [pair])[0] / len(pair[1])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The present folder, with a base, a pool and two tasks as anybody would write them for lm-eval."""
    monkeypatch.chdir(tmp_path)
    make_base(llama, tmp_path / "tiny-llama")
    make_pool(llama, tmp_path, 3)
    rows = [{"q": TEXTS[i], "a": as_text([20 + i]), "b": as_text([40 + i, 50]), "gold": i % 2} for i in range(8)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.json"}}, "test_split": "test"}
    tasks = {
        "choosing": {
            "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["{{a}}", "{{b}}"],
            "doc_to_target": "gold", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "writing": {
            "output_type": "generate_until", "doc_to_text": "{{q}}", "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["<1>"], "max_gen_toks": 5}, "metric_list": [{"metric": "exact_match"}],
        },
    }  # fmt: skip
    (tmp_path / "tasks").mkdir()
    for name, task in tasks.items():
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_routed", [False, True])
def test_target_loss_and_answer(kind: str, is_routed: bool, tmp_path: Path) -> None:
    """As `target_losses` and `answer` say of one text at a time."""
    model: Any = MODELS[kind]()
    if is_routed:
        model = RoutedModel.from_pool(model, make_pool(MODELS[kind], tmp_path))
    coder, counts = make_encoder(model), list[int]()
    lm = RoutedLM(model, coder, batch_tokens=60, on_batch=counts.append)
    pairs = [(text, as_text(token_ids(i % 4, seed=50 + i).tolist())) for i, text in enumerate(TEXTS)]
    pairs += [(TEXTS[0], as_text([9])), (TEXTS[0], as_text([9, 10]))]
    found = lm.target_loss([request("target_loss", *pair) for pair in pairs])
    expected = [mean_loss(model, coder, *pair) for pair in pairs]
    assert found == pytest.approx(expected, rel=1e-5)
    asked = [(text, 3 + 2 * (i % 2)) for i, text in enumerate(TEXTS)]
    written = lm.answer([request("answer", *pair) for pair in asked])
    assert written == [answer(model, coder, text, GenerationConfig(max_new_tokens=n)).text for text, n in asked]
    assert sum(counts) == len(pairs) + len(asked)
    counts.clear()
    large = RoutedLM(model, coder, batch_tokens=1, answer_tokens=10_000, on_batch=counts.append)
    assert large.answer([request("answer", *pair) for pair in asked]) == written
    assert len(counts) == 2  # one batch for each of the two lengths


@pytest.mark.parametrize("kind", KINDS)
def test_lm_eval_s_requests_are_answered_as_by_its_own_model(kind: str) -> None:
    ours, theirs = MODELS[kind](), MODELS[kind]()
    coder = make_encoder(ours)
    routed = RoutedLM(ours, coder, batch_tokens=40)
    plain = HFLM(pretrained=theirs, tokenizer=make_tokenizer())
    scored = [request("loglikelihood", text, " " + as_text([30 + i, 31])) for i, text in enumerate(TEXTS)]
    scored.append(request("loglikelihood", as_text(token_ids(300, seed=1).tolist()), " <30>"))  # longer than the model
    for (found, greedy), (expected, best) in zip(
        routed.loglikelihood(scored), plain.loglikelihood(scored), strict=True
    ):
        assert found == pytest.approx(expected, rel=1e-5) and greedy == best
    rolled = [request("loglikelihood_rolling", text) for text in TEXTS]
    assert routed.loglikelihood_rolling(rolled) == pytest.approx(plain.loglikelihood_rolling(rolled), rel=1e-5)
    written = [request("generate_until", text, {"until": ["<1>"], "max_gen_toks": 4}) for text in TEXTS]
    assert routed.generate_until(written) == plain.generate_until(written)


@pytest.mark.slow
def test_lm_eval_s_own_tasks_run_on_a_pool(here: Path) -> None:
    arguments = "pool=pool,router=phatgoose,top_k=1,temperature=0.5"
    out = here / "out"
    common = ("--model", "phatgoose", "--include_path", here / "tasks", "--device", "cpu", "--output_path", out)
    result = run("lm-eval", *common, "--model_args", arguments, "--tasks", "choosing,writing", "--log_samples")
    assert result.code == 0, result.err
    assert "choosing" in result.out and "acc_norm" in result.out
    (file,) = out.rglob("results_*.json")
    report = json.loads(file.read_text())
    model = RoutedModel.from_pool(llama(), PoolLM("pool").routed.pool, top_k=1, temperature=0.5)
    assert report["config"]["pool"] == model.pool.fingerprint
    lm = HFLM(pretrained=model.model, tokenizer=make_tokenizer())
    tasks = TaskManager(include_path=str(here / "tasks"), include_defaults=False)
    expected = evaluator.simple_evaluate(lm, tasks=["choosing", "writing"], task_manager=tasks, bootstrap_iters=0)
    assert expected is not None
    for measure in ("acc,none", "acc_norm,none"):
        assert report["results"]["choosing"][measure] == expected["results"]["choosing"][measure]
    (file,) = out.rglob("samples_writing_*.jsonl")
    found = [json.loads(line)["resps"] for line in file.read_text().splitlines()]
    assert found == [sample["resps"] for sample in expected["samples"]["writing"]]


def test_the_suites_run_through_lm_eval(here: Path) -> None:
    rows = [
        {"input": TEXTS[i], "choices": ["<9>", "<10> <11>"], "label": i % 2, "example_id": str(i)} for i in range(6)
    ]
    folder = here / "data" / "t0ho" / "rendered"
    folder.mkdir(parents=True)
    with gzip.open(folder / "rte.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    report = evaluator.simple_evaluate(
        "phatgoose",
        "pool=pool,separator=<3>",
        tasks=["t0ho_rte"],
        device="cuda:0",  # what lm-eval's command line says if nobody does
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": "data"}),
        bootstrap_iters=0,
    )
    assert report is not None
    model = RoutedModel.from_pool(llama(), PoolLM("pool").routed.pool)
    coder = Encoder(make_tokenizer(), model.config, TextConfig(separator="<3>"))
    right = []
    for row in rows:
        losses = [mean_loss(model, coder, row["input"], choice) for choice in row["choices"]]
        right.append(losses.index(min(losses)) == row["label"])
    assert report["results"]["t0ho_rte"]["score,none"] == sum(right) / len(right)


def test_what_cannot_run_fails_first(here: Path) -> None:
    fails(RouterError, "nearest", "phatgoose", action=lambda: PoolLM("pool", router="nearest"))
    fails(RouterError, "top_k 4", action=lambda: PoolLM("pool", top_k=4))
    fails(ConfigError, "'topk'", "top_k", action=lambda: PoolLM("pool", topk=1))
    fails(BaseModelError, "org/other", action=lambda: PoolLM("pool", base="org/other"))
