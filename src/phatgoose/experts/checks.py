"""Checks on the experts of a pool: one base model, one shape per site, undamaged files, finite numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from phatgoose.errors import BaseModelError, PoolError
from phatgoose.experts.embeddings import ENCODER, load_embeddings
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import MANIFEST_FILE, BaseId, Entry
from phatgoose.files import sha256


def check_base(pool: Path, base: BaseId, expert: Expert) -> None:
    """Raise PoolError unless an expert was trained on `base`, the base model of the pool in folder `pool`."""
    config = expert.adapter.config
    theirs = BaseId(name=config.base, revision=config.revision)
    if not base.matches(theirs):
        raise PoolError(
            f"expert {expert.name!r} was made for another base model than pool {pool}",
            found=str(theirs),
            expected=str(base),
            fix=f"phatgoose pool create OTHER --base {theirs}",
        )


def check_base_name(pool: Path, base: BaseId, name: str | None) -> str:
    """Name of the base model to load for the pool in folder `pool`: `name` if given, else the pool's own.

    Raises:
        BaseModelError: `name` is not the pool's base model.
    """
    if name is not None and not base.matches(BaseId(name=name)):
        raise BaseModelError(
            f"pool {pool} is for another base model", found=name, expected=str(base), fix="leave --base out"
        )
    return name or base.name


def base_of(expert: Expert, base: str | None = None, revision: str | None = None) -> BaseId:
    """The base model to load for an expert: the given one, else the one that its adapter names.

    Raises:
        BaseModelError: the given model is not the adapter's, or neither is known.
    """
    named = BaseId(name=expert.adapter.config.base, revision=expert.adapter.config.revision)
    wanted = BaseId(name=base or named.name, revision=revision or named.revision)
    if not wanted.name:
        raise BaseModelError(f"adapter {expert.folder} does not name its base model", fix="--base BASE")
    if not wanted.matches(named):
        raise BaseModelError(
            f"adapter {expert.folder} was trained on another base model",
            found=str(wanted),
            expected=str(named),
            fix="leave --base out",
        )
    return wanted


def check_tensors(expert: Expert) -> None:
    """Read every tensor of an expert once. Raises AdapterError, GateError or PrototypeError if one is damaged."""
    for _ in expert.adapter.load():
        pass
    if expert.has_gate:
        expert.load_gate()
    if expert.brings("activations"):
        expert.load_activations()
    if expert.brings("embeddings"):
        load_embeddings(expert.folder, ENCODER)


def check_files(pool: Path, entry: Entry, folder: Path) -> None:
    """Raise PoolError unless `folder` holds the files of `entry`, with the same sha256."""
    for name, expected in entry.files.items():
        path = folder / name
        actual = sha256(path)[:12] if path.is_file() else "no such file"
        if actual != expected[:12]:
            raise PoolError(
                f"expert {entry.name!r}: {name} is not the file that was added",
                found=actual,
                expected=f"sha256 {expected[:12]}",
                fix=f"phatgoose pool remove {pool} {entry.name}, then add it again",
            )


def check_shapes(pool: Path, expert: Expert, known: dict[str, tuple[str, int, int]]) -> None:
    """Compare an expert's feature counts with those of the experts checked before.

    Args:
        pool: the pool's folder.
        expert: the expert to check.
        known: site -> (expert, in-features, out-features) so far; the new sites of `expert` are added.

    Raises:
        PoolError: a site has other feature counts than in an earlier expert.
    """
    for site, shape in expert.shapes.items():
        owner, *features = known.setdefault(site, (expert.name, shape.in_features, shape.out_features))
        if features != [shape.in_features, shape.out_features]:
            raise PoolError(
                f"experts {owner!r} and {expert.name!r} were made for different base models",
                found=f"{site}: {features} and {[shape.in_features, shape.out_features]}",
                expected="one shape per site",
                fix=f"phatgoose pool remove {pool} {expert.name}",
            )


def check_expert(pool: Path, base: BaseId, expert: Expert) -> None:
    """Check what an expert needs for a place in the pool in folder `pool`: its base model and finite tensors.

    Raises:
        PoolError: the expert was trained on another base model.
        AdapterError, GateError, PrototypeError: a tensor is damaged.
    """
    check_base(pool, base, expert)
    check_tensors(expert)


def check_entry(
    pool: Path, base: BaseId, entry: Entry, folder: Path, known: dict[str, tuple[str, int, int]], model: Any | None
) -> None:
    """Check one manifest entry and the files it names.

    Args:
        pool: the pool's folder.
        base: the pool's base model.
        entry: the entry to check.
        folder: where the expert's files are.
        known: shapes so far; see `check_shapes`.
        model: a loaded (or meta) base model to compare shapes with, or None.

    Raises:
        PoolError: a file is missing or changed, or a shape or the base model differs from the pool's.
        AdapterError, GateError, PrototypeError: a file is damaged.
        BaseModelError: the expert does not fit `model`.
    """
    check_files(pool, entry, folder)
    expert = Expert(folder, entry.name)
    check_expert(pool, base, expert)
    check_shapes(pool, expert, known)
    if model is not None:
        # imports transformers, which a check without a model does not need
        from phatgoose.experts.sites import check_sites

        check_sites(model, [expert])


def check_name_is_free(pool: Path, names: Sequence[str], name: str, adapter: str | Path) -> None:
    """Raise PoolError if the pool in folder `pool` already has an expert `name`; `adapter` is for the message."""
    if name in names:
        raise PoolError(
            f"pool {pool} already has an expert {name!r}",
            expected="a new name",
            fix=f"phatgoose pool add {pool} {adapter} --name OTHER, or first: phatgoose pool remove {pool} {name}",
        )


def check_new_folder(folder: Path) -> None:
    """Raise PoolError unless a new pool can be created at `folder`: it does not exist, or is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PoolError(
            f"cannot create a pool in {folder}",
            found="a pool" if (folder / MANIFEST_FILE).is_file() else "a file, or a folder that is not empty",
            expected="no folder, or an empty one",
            fix="choose another folder",
        )
