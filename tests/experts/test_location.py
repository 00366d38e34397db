"""An expert by its path, inside a pool and outside."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from helpers.checks import fails, files_of
from helpers.models import llama
from helpers.pools import make_gate, make_pool
from phatgoose.errors import AdapterError, PoolError
from phatgoose.experts.location import containing_pool, editing, open_expert
from phatgoose.experts.manifest import MANIFEST_FILE
from phatgoose.experts.pool import Pool


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with experts e0 and e1, and a pool of them."""
    folder = tmp_path_factory.mktemp("template")
    make_pool(llama, folder, 2)
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "here"))


def test_inside_a_pool(here: Path) -> None:
    path = here / "pool" / "experts" / "e1"
    contained = containing_pool(path)
    assert contained is not None
    assert (contained[0].fingerprint, contained[1]) == (Pool.open(here / "pool").fingerprint, "e1")
    assert open_expert(path).folder.samefile(path)


def test_outside_a_pool(here: Path) -> None:
    assert containing_pool(here / "e1") is None
    assert open_expert(here / "e1").folder == here / "e1"
    fails(AdapterError, "no such folder", action=lambda: open_expert(here / "e9"))
    fails(AdapterError, "no such folder", action=lambda: open_expert(here / "pool" / "experts" / "e9"))


def test_a_name_outlives_its_folder(here: Path) -> None:
    """A changed expert moves to another folder; people keep the path they know."""
    path = here / "pool" / "experts" / "e0"
    with editing(path) as expert:
        make_gate(expert.folder, seed=5)
    moved = Pool.open(here / "pool").expert("e0").folder
    assert not path.exists()
    assert open_expert(path).folder.samefile(moved)
    assert open_expert(moved).name == "e0"  # by its folder too

    with editing(path) as expert:
        assert expert.checksums() == Pool.open(here / "pool").entry("e0").files
        make_gate(expert.folder, seed=6)
    assert path.exists()
    assert Pool.open(here / "pool").check() == []


def test_editing_outside_a_pool_writes_in_place(here: Path) -> None:
    before = files_of(here)
    with editing(here / "e0") as expert:
        assert expert.folder == here / "e0"
        make_gate(expert.folder, seed=5)
    changed = {name for name, digest in files_of(here).items() if before[name] != digest}
    assert changed == {"e0/gate.safetensors"}


def test_a_damaged_manifest(here: Path) -> None:
    (here / "pool" / MANIFEST_FILE).write_text("{")
    fails(PoolError, "cannot read", action=lambda: open_expert(here / "pool" / "experts" / "e0"))
