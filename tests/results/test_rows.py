"""Results folders: what is read, and every way in which one can be wrong."""

from __future__ import annotations

import json
import os
import tarfile

import numpy as np
import pytest

from helpers.checks import fails, files_of
from helpers.results import add_row
from phatgoose.errors import ResultsError
from phatgoose.results.reader import read_results


def make(folder, methods=("phatgoose", "arrow"), tasks=("rte", "cb"), **changes):
    for task in tasks:
        for method in methods:
            add_row(folder, "t0ho", task, method, [1, 0, 0, 1], **changes)
    return folder


def rows_of(folder):
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def write_rows(folder, rows, end="\n"):
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + end)


def edit(folder, number=0, **changes):
    rows = rows_of(folder)
    rows[number] |= changes
    write_rows(folder, rows)


def edit_examples(folder, **changes):
    path = folder / rows_of(folder)[0]["examples"]
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def twice(folder):
    """Another row of the first cell, with a better score."""
    row = rows_of(folder)[0] | {"score": 1.0, "examples": "examples/again.json"}
    ids = [f"{row['task']}-{i}" for i in range(4)]
    (folder / row["examples"]).write_text(json.dumps({"example_ids": ids, "scores": [1] * 4}))
    write_rows(folder, [*rows_of(folder), row])


def test_renderings_are_summed_by_example(tmp_path):
    add_row(tmp_path, "t0ho", "rte", "phatgoose", [1, 0, 0.5, 1, 0], ids=["b", "a", "b", "b", "c"])
    (result,), warnings = read_results([tmp_path])
    assert warnings == []
    assert list(result.example_ids) == ["a", "b", "c"]
    assert list(result.sums_C) == [0, 2.5, 0]
    assert list(result.counts_C) == [1, 3, 1]
    assert (result.suite, result.task, result.method, result.seed) == ("t0ho", "rte", "phatgoose", 0)
    assert result.score == 0.5
    assert result.source.endswith("rows.jsonl, line 1")


def test_numbers_as_example_ids(tmp_path):
    add_row(tmp_path, "t0ho", "rte", "phatgoose", [1, 0], ids=[7, 8])
    (result,), _ = read_results([str(tmp_path)])
    assert list(result.example_ids) == ["7", "8"]


def test_line_breaks_inside_names_are_no_lines(tmp_path):
    add_row(tmp_path, "t0ho", "rte\u2028\x85", "phatgoose", [1, 0])
    with (tmp_path / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(rows_of(tmp_path)[0] | {"seed": 1}, ensure_ascii=False) + "\n\n")
    results, warnings = read_results([tmp_path])
    assert len(results) == 2
    assert warnings == []


def test_torn_last_line_is_left_out(tmp_path):
    make(tmp_path)
    path = tmp_path / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    results, (warning,) = read_results([tmp_path])
    assert len(results) == 3
    assert f"{path}, line 4" in warning
    assert "incomplete" in warning
    # within a letter of two bytes, too
    path.write_bytes(whole + '{"suite": "ü'.encode()[:-1])
    results, (warning,) = read_results([tmp_path])
    assert len(results) == 4
    # whole but for its line break
    path.write_bytes(whole[:-1])
    results, warnings = read_results([tmp_path])
    assert (len(results), warnings) == (4, [])


def test_torn_line_in_the_middle(tmp_path):
    make(tmp_path)
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    lines[1] = lines[1][:30]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    fails(ResultsError, "line 2", "phatgoose eval", action=lambda: read_results([tmp_path]))


def test_only_a_torn_line(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"format"')
    fails(ResultsError, "no results yet", action=lambda: read_results([tmp_path]))


# What is wrong -> how it is made so, words of the message
BROKEN = {
    "format": (lambda f: edit(f, format=2), ("line 1", "format 2", "expected: format 1")),
    "no format": (lambda f: write_rows(f, [[1]]), ("format None",)),
    "field of another type": (lambda f: edit(f, seed="0"), ("seed: '0'", "line 1")),
    "missing examples": (lambda f: (f / rows_of(f)[0]["examples"]).unlink(), ("t0ho/rte with phatgoose", "missing")),
    "examples that are a folder": (lambda f: edit(f, examples="examples"), ("cannot be read",)),
    "examples elsewhere": (lambda f: edit(f, examples="../secret.json"), ("outside its folder", "../secret.json")),
    "examples at an absolute path": (lambda f: edit(f, examples="/etc/hostname"), ("outside its folder",)),
    "examples of no JSON": (lambda f: (f / rows_of(f)[0]["examples"]).write_text("["), ("cannot be read",)),
    "examples without scores": (lambda f: edit_examples(f, scores=None), ("damaged", "4 example_ids")),
    "fewer scores": (lambda f: edit_examples(f, scores=[1, 0, 0]), ("damaged", "4 and 3")),
    "scores that are words": (lambda f: edit_examples(f, scores=["a"] * 4), ("damaged",)),
    "other number of rows": (lambda f: edit(f, num_rows=5), ("damaged", "4 and 4", "5 example_ids")),
    "no examples at all": (
        lambda f: (edit_examples(f, scores=[], example_ids=[]), edit(f, num_rows=0)),
        ("damaged", "0 and 0"),
    ),
    "NaN": (lambda f: edit_examples(f, scores=[1, 0, 0, float("nan")]), ("numbers from 0 to 1",)),
    "score above 1": (lambda f: edit_examples(f, scores=[1, 0, 0, 1.5]), ("numbers from 0 to 1",)),
    "score that is not the mean": (lambda f: edit(f, score=0.51), ("0.500000", "0.510000")),
    "two pools": (lambda f: edit(f, 3, pool="b" * 64), ("mixes two pools", "a" * 12, "b" * 12, "line 4")),
    "other data": (lambda f: edit(f, 1, data="other"), ("t0ho/rte", "different data", "phatgoose", "arrow")),
    "other metric": (lambda f: edit(f, 1, metric="rouge"), ("different metric",)),
    "other prompts": (lambda f: edit(f, 1, text={"separator": " "}), ("different text",)),
    "other dtype": (lambda f: edit(f, 1, dtype="bf16"), ("different dtype",)),
    "other base": (lambda f: edit(f, 1, base="other"), ("different base",)),
    "other settings of one method": (lambda f: edit(f, 2, config={"top_k": 1}), ("phatgoose has different settings",)),
    "a cell twice": (twice, ("evaluated twice", "0.5000", "1.0000", "line 5")),
    "no rows": (lambda f: (f / "rows.jsonl").write_text("\n"), ("no results yet",)),
    "no folder": (lambda f: (f / "rows.jsonl").unlink(), ("is not a results folder", "phatgoose eval")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders(tmp_path, name):
    change, words = BROKEN[name]
    change(make(tmp_path))
    before = files_of(tmp_path)
    error = fails(ResultsError, *words, action=lambda: read_results([tmp_path]))
    assert error.fix
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("ids", [["a", "c", "c"], ["a", "a", "b"]])
def test_same_data_but_other_examples(tmp_path, ids):
    add_row(tmp_path, "t0ho", "rte", "phatgoose", [1, 0, 0], ids=["a", "b", "b"], data="same")
    add_row(tmp_path, "t0ho", "rte", "arrow", [1, 0, 0], ids=ids, data="same")
    fails(ResultsError, "different example_ids", action=lambda: read_results([tmp_path]))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can read every file")
def test_file_that_cannot_be_read(tmp_path):
    make(tmp_path)
    (tmp_path / "rows.jsonl").chmod(0)
    fails(ResultsError, "cannot be read", action=lambda: read_results([tmp_path]))


def test_repeated_rows_count_once(tmp_path):
    make(tmp_path)
    rows = rows_of(tmp_path)
    write_rows(tmp_path, [*rows, rows[0]])
    assert len(read_results([tmp_path])[0]) == 4
    assert len(read_results([tmp_path, tmp_path / "." / ""])[0]) == 4


def test_one_pool_in_several_folders(tmp_path):
    make(tmp_path / "a", ["phatgoose"])
    make(tmp_path / "b", ["arrow"])
    results, _ = read_results([tmp_path / "a", tmp_path / "b"])
    assert [result.method for result in results] == ["phatgoose"] * 2 + ["arrow"] * 2


def test_training_seeds(tmp_path):
    make(tmp_path / "a", seed=0)
    make(tmp_path / "b", seed=1, pool="b" * 64)
    results, _ = read_results([tmp_path / "a", tmp_path / "b"])
    assert len(results) == 8
    make(tmp_path / "c", seed=0, pool="c" * 64, pool_name="flan")
    error = fails(
        ResultsError,
        "two pools with the same seed",
        "tiny",
        "flan",
        action=lambda: read_results([tmp_path / "a", tmp_path / "c"]),
    )
    assert "--seed" in error.fix


def test_order_of_examples_does_not_matter(tmp_path):
    add_row(tmp_path, "t0ho", "rte", "phatgoose", [1, 0, 0], ids=["a", "b", "c"], data="same")
    add_row(tmp_path, "t0ho", "rte", "arrow", [0, 0, 1], ids=["c", "b", "a"], data="same")
    results, _ = read_results([tmp_path])
    np.testing.assert_array_equal(results[0].sums_C, results[1].sums_C)


def test_multitask_of_each_seed_is_another_adapter(tmp_path):
    """It routes in a pool of its own, whose fingerprint is among its settings."""
    for seed in (0, 1):
        config = {"router": "single", "pool": str(seed) * 64}
        (tmp_path / str(seed)).mkdir()
        add_row(
            tmp_path / str(seed), "t0ho", "rte", "multitask", [1.0, 0.0], seed=seed, config=config, pool=str(seed) * 64
        )
    results, _ = read_results([tmp_path / "0", tmp_path / "1"])
    assert [result.seed for result in results] == [0, 1]
    add_row(
        tmp_path / "0", "t0ho", "cb", "multitask", [1.0], config={"router": "single", "pool": "2" * 64}, pool="0" * 64
    )
    with pytest.raises(ResultsError, match="multitask has different settings"):
        read_results([tmp_path / "0"])


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.xz"])
def test_packed(suffix, tmp_path):
    make(tmp_path / "out")
    make(tmp_path / "other", seed=1, pool="b" * 64)
    archive = tmp_path / f"out.{suffix}"
    with tarfile.open(archive, f"w:{suffix[4:]}") as tar:
        tar.add(tmp_path / "out", "seed-0/results")
    packed, plain = (read_results([path, tmp_path / "other"])[0] for path in (archive, tmp_path / "out"))
    assert [result.cell for result in packed] == [result.cell for result in plain]
    assert all(np.array_equal(a.sums_C, b.sums_C) for a, b in zip(packed, plain, strict=True))
    assert f"out.{suffix}" in packed[0].source
    third = make(tmp_path / "third", pool="c" * 64)
    fails(ResultsError, "the same seed", f"out.{suffix}", action=lambda: read_results([archive, third]))
    archive.write_bytes(archive.read_bytes()[:300])
    fails(ResultsError, "cannot be read", f"out.{suffix}", action=lambda: read_results([archive]))


def test_an_archive_of_two_folders(tmp_path):
    for name in ("a", "b"):
        make(tmp_path / name)
    with tarfile.open(tmp_path / "both.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(tmp_path / name, name)
    fails(ResultsError, "2 results folders", action=lambda: read_results([tmp_path / "both.tar"]))
    with tarfile.open(tmp_path / "none.tar", "w"):
        pass
    fails(ResultsError, "no rows.jsonl", action=lambda: read_results([tmp_path / "none.tar"]))
