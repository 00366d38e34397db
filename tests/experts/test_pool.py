"""A pool on disk: its manifest, its changes, and what a killed command leaves behind."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checks import assert_close, fails, files_of
from helpers.data import token_ids
from helpers.models import llama
from helpers.pools import make_expert, make_gate, make_pool
from phatgoose.errors import PoolError
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import MANIFEST_FILE, BaseId
from phatgoose.experts.pool import Pool
from phatgoose.experts.vectors import GATE
from phatgoose.routing.model import RoutedModel


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a pool of e0, e1, e2, and of an expert `new` beside it."""
    folder = tmp_path_factory.mktemp("template")
    make_pool(llama, folder)
    make_expert(llama, folder / "new", seed=9)
    return folder


@pytest.fixture
def pool(template: Path, tmp_path: Path) -> Pool:
    return Pool.open(shutil.copytree(template / "pool", tmp_path / "pool"))


def folders(pool: Pool) -> set[str]:
    return {path.name for path in (pool.folder / "experts").iterdir()}


def test_add_copies_the_expert(pool: Pool, template: Path) -> None:
    (template / "new" / "README.md").write_text("not a part of an expert")
    entry = pool.add(template / "new", source="somewhere")
    again = Pool.open(pool.folder)
    assert again.names == pool.names == ("e0", "e1", "e2", "new")
    assert again.entries[-1] == entry
    assert entry.source == "somewhere"
    assert set(entry.files) == folder_files(pool.folder / str(entry.path))
    assert "README.md" not in entry.files
    for name in entry.files:
        assert (pool.folder / str(entry.path) / name).read_bytes() == (template / "new" / name).read_bytes()
    assert again.check(llama()) == []


def folder_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_lost_folder_is_told(pool: Pool) -> None:
    shutil.rmtree(pool.folder / "experts" / "e1")
    for action in (pool.experts, lambda: route(pool)):
        fails(PoolError, "has lost expert 'e1'", "experts/e1", "phatgoose pool remove", action=action)
    (problem,) = pool.check()
    assert "has lost expert 'e1'" in str(problem)
    pool.remove("e1")
    assert Pool.open(pool.folder).check() == []


def test_remove_then_add_is_the_same_pool(pool: Pool, template: Path) -> None:
    before, fingerprint = files_of(pool.folder), pool.fingerprint
    pool.add(template / "new")
    assert pool.fingerprint != fingerprint
    pool.remove("new")
    assert files_of(pool.folder) == before
    assert pool.fingerprint == Pool.open(pool.folder).fingerprint == fingerprint


def test_models_and_changes_of_their_pool(pool: Pool, template: Path) -> None:
    """A model that is loaded stays as it is; the next one has the experts that are left."""
    inputs = {"input_ids": token_ids(2, 6)}
    with torch.no_grad():
        model = RoutedModel.from_pool(llama(), pool)
        expected = model(**inputs).logits
        pool.remove("e1")
        assert torch.equal(model(**inputs).logits, expected)
        changed = route(pool)(**inputs).logits
        assert not torch.equal(changed, expected)
        never_there = Pool.open(template / "pool").subset(["e0", "e2"])
        assert torch.equal(changed, route(never_there)(**inputs).logits)
        pool.add(template / "e1")  # at the end: the order is another, the mixture the same
        assert_close(route(pool)(**inputs).logits, expected)


def test_replace_keeps_the_expert_id(pool: Pool, template: Path) -> None:
    for _ in range(3):
        pool.replace("e1", template / "new")
        assert Pool.open(pool.folder).names == ("e0", "e1", "e2")
        assert len(folders(pool)) == 3
        assert pool.check() == []
        found = load_file(pool.expert("e1").folder / GATE.file)
        assert all(torch.equal(found[key], v) for key, v in load_file(template / "new" / GATE.file).items())


def test_replaced_files_are_no_longer_the_hubs(pool: Pool, template: Path, tmp_path: Path) -> None:
    hub = {"repo": "org/new", "revision": "c0ffee"}
    added = pool.add(template / "new", source="org/new@c0ffee", hub=hub)
    version = Path(shutil.copytree(template / "new", tmp_path / "version"))
    again = pool.replace("new", version)
    assert (again.files, again.source, again.hub) == (added.files, "org/new@c0ffee", hub)

    for seed in (1, 2):
        make_gate(version, seed)
        gated = pool.replace("new", version)
        assert gated.files != added.files
        assert (gated.source, gated.hub) == ("org/new@c0ffee (adapter only)", None)
        assert Pool.open(pool.folder).entry("new") == gated

    other = pool.replace("new", template / "e0")
    assert (other.name, other.source, other.hub) == ("new", "e0", None)
    assert pool.check() == []


def test_two_writers_see_each_other(pool: Pool, template: Path) -> None:
    other = Pool.open(pool.folder)
    pool.add(template / "new")
    other.add(template / "new", "other")
    other.remove("e0")
    pool.remove("e1")
    assert Pool.open(pool.folder).names == pool.names == ("e2", "new", "other")
    assert pool.check() == []


def test_subset_orders_the_expert_ids(pool: Pool) -> None:
    before = files_of(pool.folder)
    chosen = pool.subset(["e2", "e0"])
    assert chosen.names == ("e2", "e0")
    assert [expert.name for expert in chosen.experts()] == ["e2", "e0"]
    assert RoutedModel.from_pool(llama(), chosen).pool.names == ("e2", "e0")
    fails(PoolError, "'e9'", action=lambda: pool.subset(["e9"]))
    assert files_of(pool.folder) == before


def test_editing_commits_what_was_written(pool: Pool, template: Path) -> None:
    with pool.editing("e1") as copy:
        assert copy.name == "e1"
        assert copy.checksums() == pool.entry("e1").files
        make_gate(copy.folder, seed=5)
        assert Pool.open(pool.folder).fingerprint == pool.fingerprint  # not before the block ends
    again = Pool.open(pool.folder)
    assert again.names == pool.names == ("e0", "e1", "e2")
    assert again.entry("e1").source == "e1 (adapter only)"
    assert again.check() == []
    expected = make_gate(Path(shutil.copytree(template / "e1", pool.folder.with_name("e1"))), seed=5)
    assert again.entry("e1").files == Expert(expected).checksums()


def test_editing_without_a_change_commits_nothing(pool: Pool) -> None:
    before = files_of(pool.folder)
    with pool.editing("e1") as copy:
        (copy.folder / "notes.txt").write_text("not a part of an expert")
    assert files_of(pool.folder) == before


def test_editing_that_fails_commits_nothing(pool: Pool) -> None:
    before = files_of(pool.folder)
    with pytest.raises(KeyboardInterrupt), pool.editing("e1") as copy:
        make_gate(copy.folder, seed=5)
        raise KeyboardInterrupt
    assert files_of(pool.folder) == before
    assert not copy.folder.exists()


@pytest.mark.parametrize("first", ["main", "other"])
def test_one_of_several_processes_commits(first: str, pool: Pool) -> None:
    """All processes of one training edit the expert, and only the main one writes the gate."""
    main, other = ExitStack(), ExitStack()
    copy = main.enter_context(pool.editing("e1"))
    other.enter_context(Pool.open(pool.folder).editing("e1"))
    make_gate(copy.folder, seed=5)
    expected = copy.checksums()
    for process in (main, other) if first == "main" else (other, main):
        process.close()
    assert Pool.open(pool.folder).entry("e1").files == expected
    assert Pool.open(pool.folder).check() == []
    assert len(folders(pool)) == 3


def test_editing_an_expert_that_is_not_there(pool: Pool) -> None:
    def edit() -> None:
        with pool.editing("e9"):
            pass

    fails(PoolError, "'e9'", "e0, e1, e2", action=edit)


def test_names_of_base_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def same(one: str, other: str, revisions: tuple[str | None, str | None] = (None, None)) -> bool:
        pair = BaseId(name=one, revision=revisions[0]), BaseId(name=other, revision=revisions[1])
        assert pair[0].matches(pair[1]) == pair[1].matches(pair[0])
        return pair[0].matches(pair[1])

    assert same("org/model", "org/model")
    assert not same("org/model", "other/model")
    assert same("/here/model", "/there/lies/model")
    assert same("/here/model", "org/model")
    assert not same("/here/model", "org/another")
    assert same("", "org/model")
    assert same("org/model", "org/model", ("a", None))
    assert not same("org/model", "org/model", ("a", "b"))


# --- killed in the middle -------------------------------------------------------------------


# What a change does, one after the other; the process dies at one of these places.
KILL = """
import os, shutil, signal, sys
from phatgoose.experts import manifest, pool as module

folder, expert, action, place = sys.argv[1:]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

pool = module.Pool.open(folder)
commit = module.Pool._commit
if place == "while copying":
    steps = iter([shutil.copyfile, shutil.copyfile, die])
    module.shutil.copyfile = lambda *args: next(steps)(*args)
elif place == "before the commit":
    manifest.write_json = die
elif place == "in the commit":  # of a removal, which renames nothing before
    module.Path.replace = die
elif place == "after the commit":
    module.Pool._commit = lambda *args: (commit(*args), die())
if action == "add":
    pool.add(expert)
elif action == "replace":
    pool.replace("e0", expert)
elif action == "edit":
    with pool.editing("e0") as copy:
        (copy.folder / "gate_config.json").write_text("{}")
else:
    pool.remove("e0")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("action", "place"),
    [
        ("add", "while copying"),
        ("add", "before the commit"),
        ("replace", "after the commit"),
        ("edit", "before the commit"),
        ("edit", "after the commit"),
        ("remove", "in the commit"),
    ],
)
def test_killed(action: str, place: str, pool: Pool, template: Path) -> None:
    """The old pool or the new one, whole; the next change sweeps what was left."""
    old = pool.fingerprint
    script = [sys.executable, "-c", KILL, str(pool.folder), str(template / "new"), action, place]
    assert subprocess.run(script, check=False, timeout=120).returncode == -signal.SIGKILL
    left = Pool.open(pool.folder)
    assert left.check() == []
    assert left.names == ("e0", "e1", "e2")
    assert (left.fingerprint == old) == (place != "after the commit")
    debris = folders(left) - {Path(str(entry.path)).name for entry in left.entries}
    temporary = [path.name for path in pool.folder.iterdir() if path.name.startswith(".pool.json.")]
    assert len(debris) + len(temporary) == 1

    left.add(template / "new", "later")
    assert left.check(llama()) == []
    assert len(folders(left)) == 4
    assert folder_files(left.folder) - {".lock"} == {MANIFEST_FILE, "experts"}


def test_failed_commit(pool: Pool, template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the last moment: the error comes through, the pool is as it was."""
    before = files_of(pool.folder)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.experts.manifest.write_json", full_disk)
        with pytest.raises(OSError, match="No space left"):
            pool.add(template / "new")
    assert pool.names == Pool.open(pool.folder).names == ("e0", "e1", "e2")
    pool.add(template / "new")
    pool.remove("new")
    assert files_of(pool.folder) == before


# --- no pool, and broken ones ---------------------------------------------------------------


def test_no_pool(tmp_path: Path) -> None:
    fails(PoolError, "no such folder", "phatgoose pool create", action=lambda: Pool.open(tmp_path / "none"))
    fails(PoolError, "no pool.json", action=lambda: Pool.open(tmp_path))
    empty = Pool.create(tmp_path / "empty", "tiny-llama")
    fails(PoolError, "is empty", "phatgoose pool add", action=lambda: route(empty))
    fails(PoolError, "a pool", action=lambda: Pool.create(tmp_path / "empty", "tiny-llama"))
    (tmp_path / "file").write_text("")
    fails(PoolError, "a file", action=lambda: Pool.create(tmp_path / "file", "tiny-llama"))
    fails(PoolError, "found: a file", action=lambda: Pool.open(tmp_path / "file"))
    fails(PoolError, "base model", action=lambda: Pool.create(tmp_path / "baseless", ""))
    assert not (tmp_path / "baseless").exists()


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "e0", "path": "experts/e0", "hub": None, "source": "x", "files": {}} | changes


def manifest(*entries: Any, **changes: Any) -> str:
    return json.dumps({"format": 1, "base": {"name": "b", "revision": None}, "experts": entries} | changes)


MANIFESTS: dict[str, tuple[str, list[str]]] = {
    "cut off": (manifest(entry())[:40], ["JSON"]),
    "no JSON": ("\0\xff", ["JSON"]),
    "a list": ("[]", ["format, base and experts"]),
    "no base": ('{"format": 1}', ["base"]),
    "another format": (manifest(format=7), ["7", "1"]),
    "field missing": (manifest({"name": "e0"}), ["path"]),
    "field unknown": (manifest(entry(speed=9)), ["speed"]),
    "one name twice": (manifest(entry(), entry(path="experts/other")), ["'e0'"]),
    "outside": (manifest(entry(path="../..")), ["'e0'", "outside", "../.."]),
    "outside, hidden": (manifest(entry(path="experts/../../x")), ["'e0'", "outside"]),
    "the folder above": (manifest(entry(path="experts/..")), ["'e0'", "outside"]),
    "absolute": (manifest(entry(path="/etc/x")), ["'e0'", "outside", "/etc/x"]),
    "nowhere": (manifest(entry(path=None)), ["'e0'", "neither"]),
    "path is a number": (manifest(entry(path=5)), ["e0"]),
    "experts is a number": (manifest(experts=5), ["experts"]),
    "name is a path": (manifest(entry(name="../e0")), ["../e0"]),
    "files is a list": (manifest(entry(files=[])), ["files"]),
    "hub is empty": (manifest(entry(path=None, hub={"repo": "o/r"})), ["'e0'", "revision"]),
    # means experts/e0, but the sweep compares text and would delete that folder
    "path spelt otherwise": (manifest(entry(path="experts//e0")), ["'e0'", "experts//e0"]),
}


@pytest.mark.parametrize("case", MANIFESTS)
def test_broken_manifest(case: str, tmp_path: Path) -> None:
    text, words = MANIFESTS[case]
    (tmp_path / MANIFEST_FILE).write_text(text, encoding="latin-1")
    fails(PoolError, str(tmp_path / MANIFEST_FILE), *words, action=lambda: Pool.open(tmp_path))
    assert (tmp_path / MANIFEST_FILE).read_text(encoding="latin-1") == text


def route(pool: Pool) -> RoutedModel:
    return RoutedModel.from_pool(llama(), pool)
