"""The paper's protocols: which rows a task asks, and what counts as right."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from helpers.checks import fails
from helpers.grids import write_rows
from helpers.models import llama
from helpers.pools import make_pool
from phatgoose.errors import DataError, SuiteError
from phatgoose.evaluation.suites import TASKS, load_tasks
from phatgoose.evaluation.suites.metrics import answer_score, rank_classification
from phatgoose.evaluation.suites.rendering import FOLDER, PromptTemplate, read_templates, render
from phatgoose.evaluation.suites.rows import TaskRow, fingerprint, sample
from phatgoose.evaluation.suites.task import SuiteTask
from phatgoose.experts.pool import Pool
from phatgoose.results.names import SUITES

T0HO = ["anli_r1", "anli_r2", "anli_r3", "cb", "copa", "hellaswag", "rte", "wic", "winogrande", "wsc"]


def read_rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return make_pool(llama, tmp_path_factory.mktemp("pool"), 2)


def held_in(name: str, target: str, choices: list[str] | None, split: str = "validation") -> dict[str, Any]:
    return {
        "example_id": name, "input": f"{name}?", "target": target, "choices": choices, "split": split, "template": "t"
    }  # fmt: skip


# --- against the real data --------------------------------------------------------------------


@pytest.mark.parametrize("task", T0HO)
def test_rendering_the_raw_rows_gives_the_rendered_ones(task: str, shared_data: Path) -> None:
    raw = {row["example_id"]: row for row in read_rows(shared_data / "t0ho" / f"{task}.jsonl.gz")}
    expected = read_rows(shared_data / "t0ho" / "rendered" / f"{task}.jsonl.gz")
    templates = read_templates("anli.yaml" if task.startswith("anli") else f"{task}.yaml")
    found = [
        (row.example_id, row.input, row.choices, row.targets)
        for example_id in dict.fromkeys(row["example_id"] for row in expected)
        for row in render(templates, raw[example_id], example_id)
    ]
    assert found == [
        (row["example_id"], row["input"], tuple(row["choices"]), (row["choices"][row["label"]],)) for row in expected
    ]


def test_the_templates_are_promptsource_s(shared_data: Path) -> None:
    for task in T0HO:
        ours = yaml.safe_load((FOLDER / ("anli.yaml" if task.startswith("anli") else f"{task}.yaml")).read_text())
        theirs = yaml.safe_load((shared_data / "t0ho_templates" / f"{task}.yaml").read_text())
        assert ours["templates"] == theirs["templates"]


def test_every_local_task_has_its_rows(shared_data: Path, pool: Pool) -> None:
    """Reading BIG-bench's files also checks that their metric is the task's."""
    tasks = load_tasks(["t0ho", "bbh"], pool, data=shared_data)
    counts = {task.name: len(task.rows) for task in tasks if task.name != "storycloze"}
    assert len(counts) == 32
    assert (counts["rte"], counts["copa"], counts["anli_r3"]) == (2770, 1000, 7500)
    assert (counts["penguins_in_a_table"], counts["word_sorting"]) == (149, 500)
    manifest = json.loads((shared_data / "MANIFEST.json").read_text())
    rows = {entry["file"]: entry["rows"] for entry in manifest["files"]}
    assert all(rows[task.metadata["file"]] == counts[task.name] for task in tasks if task.name in counts)
    for task in tasks:
        if task.name in counts:
            for row in task.rows:
                choice = task.metric.startswith("multiple_choice")
                assert choice == (row.choices is not None)
                assert not choice or set(row.targets) <= set(row.choices or ())


def test_held_in_is_the_validation_split(shared_data: Path, tmp_path: Path) -> None:
    pool = make_pool(llama, tmp_path, 2)
    for old, new in (("e0", "agnews"), ("e1", "commongen")):
        (tmp_path / old).rename(tmp_path / new)
        pool.add(tmp_path / new)
    agnews, commongen = load_tasks(["held-in"], pool, data=shared_data)
    expected = [r for r in read_rows(shared_data / "t0hi" / "agnews.jsonl.gz") if r["split"] == "validation"]
    assert [row.input for row in agnews.rows] == [row["input"] for row in expected]
    assert (agnews.suite, agnews.name, agnews.measure, len(agnews.rows)) == ("held-in", "agnews", "accuracy", 284)
    assert (commongen.name, commongen.measure, len(commongen.rows)) == ("commongen", "rouge_l", 189)
    limited = load_tasks(["leave-one-out"], pool, data=shared_data, limit=30)
    assert [len(task.rows) for task in limited] == [30, 30]


# --- suites and tasks ----------------------------------------------------------------------------


def test_the_suites_are_the_paper_s(pool: Pool) -> None:
    tasks = load_tasks(["t0ho", "bbh", "bbl"], pool)
    assert Counter(task.suite for task in tasks) == {"t0ho": 11, "bbh": 22, "bbl": 17}
    assert sorted(task.name for task in tasks if task.suite == "t0ho") == sorted([*T0HO, "storycloze"])
    metrics = {(task.suite, task.name): task.metric for task in tasks}
    others = {key: metric for key, metric in metrics.items() if metric != "multiple_choice"}
    assert others == {
        ("bbh", "geometric_shapes"): "multiple_choice_multi",
        ("bbh", "reasoning_about_colored_objects"): "multiple_choice_multi",
        ("bbh", "multistep_arithmetic_two"): "exact_match",
        ("bbh", "object_counting"): "exact_match_multi",
        ("bbh", "word_sorting"): "exact_match",
        ("bbl", "conlang_translation"): "rouge_l",
        ("bbl", "linguistics_puzzles"): "exact_match",
        ("bbl", "novel_concepts"): "multiple_choice_multi",
        ("bbl", "operators"): "exact_match",
        ("bbl", "repeat_copy_logic"): "exact_match",
    }
    both = {name for suite, name in metrics if suite == "bbh"} & {name for suite, name in metrics if suite == "bbl"}
    assert both == {"formal_fallacies", "logical_deduction"}


def test_lm_eval_finds_the_tasks_by_name(tmp_path: Path) -> None:
    rows = [{"input": "1?", "choices": ["a", "b"], "label": i % 2, "example_id": f"rte/{i}"} for i in range(5)]
    write_rows(tmp_path / "t0ho" / "rendered" / "rte.jsonl.gz", rows)
    manager = TaskManager(include_path=str(TASKS), include_defaults=False, metadata={"data": str(tmp_path)})
    assert manager.all_groups == ["bbh", "bbl", "t0ho"] and len(manager.all_subtasks) == 50
    task = manager.load(["t0ho_rte"])["tasks"]["t0ho_rte"]
    assert isinstance(task, SuiteTask)
    task.build_all_requests(limit=3)
    requests = [(one.request_type, one.args, one.doc_id, one.idx) for one in task.instances]
    assert requests == [("target_loss", ("1?", "ab"[i % 2]), i // 2, i % 2) for i in range(6)]
    group = manager.load(["bbh"])["groups"]["bbh"]
    assert len(group.get_all_tasks()) == 22 and group.has_aggregation


def test_unknown_names_list_what_exists(pool: Pool, tmp_path: Path) -> None:
    fails(SuiteError, "'t0h0'", *SUITES, action=lambda: load_tasks(["t0h0"], pool))
    fails(SuiteError, "'rta'", "rte", "anli_r1", action=lambda: load_tasks(["t0ho"], pool, names=["rta"]))
    fails(SuiteError, "held-in", "e0, e1", action=lambda: load_tasks(["held-in"], pool, data=tmp_path))
    fails(SuiteError, "--data DIR", action=lambda: load_tasks(["held-in"], pool))
    one = pool.subset(["e0"])
    fails(SuiteError, "two or more", action=lambda: load_tasks(["leave-one-out"], one, data=tmp_path))
    assert [task.name for task in load_tasks(["t0ho"], pool, names=["wsc", "rte"])] == ["rte", "wsc"]


def test_story_cloze_says_how_to_get_it(pool: Pool, tmp_path: Path) -> None:
    (story,) = load_tasks(["t0ho"], pool, data=tmp_path, names=["storycloze"])
    words = ("storycloze.jsonl.gz", "registers", "--skip-missing")
    fails(SuiteError, *words, action=lambda: story.rows)
    (story,) = load_tasks(["t0ho"], pool, names=["storycloze"])
    fails(SuiteError, *words, action=lambda: story.rows)
    (winowhy,) = load_tasks(["bbl"], pool, data=tmp_path, names=["winowhy"])
    fails(SuiteError, "bbl/winowhy.jsonl.gz", "tasksource/bigbench", action=lambda: winowhy.rows)


def test_held_in_without_choices_is_generation(pool: Pool, tmp_path: Path) -> None:
    some = [held_in("a", "x", None), held_in("b", "y", ["y", "z"]), held_in("c", "z", ["y", "z"], "train")]
    write_rows(tmp_path / "t0hi" / "e0.jsonl.gz", some)
    write_rows(tmp_path / "t0hi" / "e1.jsonl.gz", [held_in("d", "w", None), held_in("e", "v", None, "train")])
    first, second = load_tasks(["held-in"], pool, data=tmp_path)
    assert [(row.example_id, row.choices) for row in first.rows] == [("b", ("y", "z"))]
    assert first.metric == "multiple_choice" and first.num_requests == 2
    assert [(row.example_id, row.targets) for row in second.rows] == [("d", ("w",))]
    assert second.metric == "rouge_l" and second.num_requests == 1
    second.build_all_requests()
    assert [(one.request_type, one.args) for one in second.instances] == [("answer", ("d?", 128))]


def test_a_limit_is_one_sample_for_all() -> None:
    rows = [TaskRow(example_id=str(i), input="", targets=("x",)) for i in range(100)]
    some = sample(rows, 10)
    assert some == sample(list(rows), 10) and len({row.example_id for row in some}) == 10
    assert some != rows[:10] and [int(row.example_id) for row in some] == sorted(int(row.example_id) for row in some)
    assert sample(rows, None) == sample(rows, 100) == sample(rows, 1000) == rows
    assert fingerprint(some) != fingerprint(some[::-1]) and fingerprint(some) == fingerprint(list(some))


# --- scores --------------------------------------------------------------------------------------


def test_rank_classification() -> None:
    choices = ["a", "b", "c"]
    assert rank_classification(choices, [2.0, 1.0, 3.0], ["b"]) == 1
    assert rank_classification(choices, [2.0, 1.0, 3.0], ["a", "c"]) == 0
    assert rank_classification(choices, [2.0, 1.0, 3.0], ["a", "b"]) == 1
    assert rank_classification(choices, [1.0, 1.0, 3.0], ["b"]) == 0  # the first of equal ones


def test_answers_are_matched() -> None:
    assert answer_score("exact_match", " three\n", ["three", "3"]) == 1
    assert answer_score("exact_match", "3", ["three", "3"]) == 0
    assert answer_score("exact_match_multi", "3", ["three", "3"]) == 1
    assert answer_score("exact_match_multi", "Three", ["three", "3"]) == 0
    # longest common subsequence "the cat sat": precision 3/4, recall 3/6
    found = answer_score("rouge_l", "the cat sat down", ["a dog", "the black cat sat over there"])
    assert found == pytest.approx(2 * (3 / 4) * (3 / 6) / (3 / 4 + 3 / 6))
    assert answer_score("rouge_l", "", ["a dog"]) == 0


def test_a_task_is_zero_shot(tmp_path: Path, pool: Pool) -> None:
    write_rows(tmp_path / "t0ho/rendered/cb.jsonl.gz", [{"input": "", "choices": ["a"], "label": 0, "example_id": "1"}])
    (task,) = load_tasks(["t0ho"], pool, data=tmp_path, names=["cb"])
    fails(SuiteError, "zero-shot", action=lambda: task.build_all_requests(apply_chat_template=True))
    task.set_config("num_fewshot", 3)
    fails(SuiteError, "zero-shot", "num_fewshot: 3", action=task.build_all_requests)


# --- bad rows, hubs ------------------------------------------------------------------------------

GOOD = {"input": "?", "choices": ["a", "b"], "label": 1, "example_id": "1"}
BIG = {"input": "?", "targets": ["a"], "choices": ["a", "b"], "metric": "multiple_choice", "example_id": "1"}
BROKEN = {
    "label": ("t0ho/rendered/cb", GOOD | {"label": 2}, "label"),
    "no label": ("t0ho/rendered/cb", {**GOOD, "label": None}, "label"),
    "choices": ("t0ho/rendered/cb", GOOD | {"choices": "ab"}, "choices"),
    "input": ("t0ho/rendered/cb", GOOD | {"input": 3}, "input"),
    "id": ("t0ho/rendered/cb", {k: v for k, v in GOOD.items() if k != "example_id"}, "example_id"),
    "metric": ("bbh/navigate", BIG | {"metric": "exact_match"}, "multiple_choice"),
    "targets": ("bbh/navigate", BIG | {"targets": []}, "targets"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_row_is_named(what: str, tmp_path: Path, pool: Pool) -> None:
    file, row, word = BROKEN[what]
    good = BIG if file.startswith("bbh") else GOOD
    write_rows(tmp_path / f"{file}.jsonl.gz", [good, row])
    suite, name = file.split("/")[0], file.split("/")[-1]
    (task,) = load_tasks([suite], pool, data=tmp_path, names=[name])
    fails(DataError, "line 2", word, action=lambda: task.rows)


def test_a_task_without_rows(tmp_path: Path, pool: Pool) -> None:
    write_rows(tmp_path / "bbh/navigate.jsonl.gz", [])
    (task,) = load_tasks(["bbh"], pool, data=tmp_path, names=["navigate"])
    fails(DataError, "bbh_navigate has no rows", action=lambda: task.rows)


def make_dataset(folder: Path, config: str, splits: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """A folder that `datasets` loads as it loads a dataset of a hub."""
    folder.mkdir(parents=True)
    files = []
    for split, rows in splits.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files.append({"split": split, "path": f"{split}.jsonl"})
    card = yaml.safe_dump({"configs": [{"config_name": config, "data_files": files}]})
    (folder / "README.md").write_text(f"---\n{card}---\n")


def test_tasks_from_a_hub(tmp_path: Path, pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets", reason="datasets is not installed")
    monkeypatch.chdir(tmp_path)
    cause = {"premise": "It fell.", "choice1": "pushed", "choice2": "flew", "question": "cause", "label": 0, "idx": 0}
    make_dataset(tmp_path / "super_glue", "copa", {"validation": [cause, cause | {"question": "effect", "label": 1}]})
    record = {"inputs": "Q: left?\nA:", "targets": ["yes", "y"], "idx": 0}
    record |= {"multiple_choice_targets": ["no", "yes", "y"], "multiple_choice_scores": [0, 1, 1]}
    make_dataset(tmp_path / "tasksource/bigbench", "novel_concepts", {"train": [record], "validation": [record]})
    make_dataset(tmp_path / "lukaemon/bbh", "web_of_lies", {"test": [{"input": "Lies?", "target": "No"}]})
    (copa,) = load_tasks(["t0ho"], pool, names=["copa"])
    assert Counter(row.example_id for row in copa.rows) == {"copa/00000": 10, "copa/00001": 10}
    assert {(row.targets, row.choices) for row in copa.rows if row.example_id == "copa/00001"} == {
        (("flew",), ("pushed", "flew"))
    }
    (concepts,) = load_tasks(["bbl"], pool, names=["novel_concepts"])
    expected = TaskRow(
        example_id="novel_concepts/0", input="Q: left?\nAnswer:", targets=("yes", "y"), choices=("no", "yes", "y")
    )
    assert len(concepts.rows) == 2 and concepts.rows[0] == expected
    (lies,) = load_tasks(["bbh"], pool, names=["web_of_lies"])
    assert lies.rows == [
        TaskRow(example_id="web_of_lies/0", input="Lies?\nAnswer:", targets=("No",), choices=("Yes", "No"))
    ]
    (wic,) = load_tasks(["t0ho"], pool, names=["wic"])
    fails(DataError, "super_glue", "wic", action=lambda: wic.rows)
    (rte,) = load_tasks(["t0ho"], pool, names=["rte"])
    make_dataset(tmp_path / "other" / "super_glue", "rte", {"validation": [{"premise": "It rains.", "label": 0}]})
    monkeypatch.chdir(tmp_path / "other")
    fails(DataError, "rte/00000", "hypothesis", action=lambda: rte.rows)


def test_templates_keep_pipes_and_run_no_code() -> None:
    template = PromptTemplate("t", "{{ a }} or? ||| {{ answer_choices[0] }}", "{{ a }} ||| {{ b }}")
    row = template.render({"a": "x ||| y", "b": "z"}, "1")
    assert row == TaskRow(example_id="1", input="x ||| y or?", targets=("x ||| y",), choices=("x ||| y", "z"))
    hostile = PromptTemplate("t", "{{ a.__class__.__mro__ }} ||| x", "x")
    with pytest.raises(Exception, match="unsafe"):
        hostile.render({"a": "x"}, "1")
