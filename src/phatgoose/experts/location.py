"""Experts by their path: a folder of its own, or a member of a pool.

POOL/experts/NAME always means the pool's expert NAME, although a changed expert
moves to another folder and a linked one has none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import EXPERTS, MANIFEST_FILE
from phatgoose.experts.pool import Pool


def containing_pool(path: Path) -> tuple[Pool, str] | None:
    """The pool that contains the expert at `path`, and the expert's name; None outside a pool.

    Raises:
        PoolError: the pool's manifest is damaged.
    """
    folder = path.resolve()
    root = folder.parent.parent
    if folder.parent.name != EXPERTS or not (root / MANIFEST_FILE).is_file():
        return None
    pool = Pool.open(root)
    if folder.name in pool.names:
        return pool, folder.name
    for entry in pool.entries:
        if entry.path == f"{EXPERTS}/{folder.name}":
            return pool, entry.name
    return None


def open_expert(path: Path) -> Expert:
    """Open the expert at `path`.

    Raises:
        AdapterError: there is no adapter, or a damaged one.
        PoolError: the pool's manifest is damaged, or it has lost the expert's folder.
        HubError: the expert is linked and cannot be downloaded.
    """
    contained = containing_pool(path)
    if contained is None:
        return Expert(path)
    pool, name = contained
    return pool.expert(name)


@contextmanager
def editing(path: Path) -> Iterator[Expert]:
    """Yield the expert at `path` for writing to its folder; inside a pool, see `Pool.editing`.

    Raises:
        PhatgooseError: see `open_expert` and `Pool.editing`.
    """
    contained = containing_pool(path)
    if contained is None:
        yield Expert(path)
        return
    pool, name = contained
    with pool.editing(name) as expert:
        yield expert
