"""What commands that add to an expert's folder share: which base it is for, and where they may write."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.manifest import BaseId


def open_expert(path: Path) -> Expert:
    """The expert at `path`; POOL/experts/NAME is the pool's expert of that name, wherever its files lie now.

    Raises:
        AdapterError: there is none.
        PoolError: the pool's manifest is damaged.
    """
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.manifest import EXPERTS, MANIFEST_FILE
    from phatgoose.experts.pool import Pool

    root = path.resolve().parent.parent
    if path.resolve().parent.name == EXPERTS and (root / MANIFEST_FILE).is_file():
        pool = Pool.open(root)
        # a changed expert gets another folder, and people keep its name
        if path.name in pool.names:
            return pool.expert(path.name)
    return Expert(path)


def base_of(expert: Expert, base: str | None, revision: str | None) -> BaseId:
    """The base model to load for an expert: the one asked for, if it is the one that the adapter names.

    Raises:
        BaseModelError: it is another one, or neither says.
    """
    from phatgoose.errors import BaseModelError
    from phatgoose.experts.manifest import BaseId

    made_for = BaseId(name=expert.adapter.config.base, revision=expert.adapter.config.revision)
    wanted = BaseId(name=base or made_for.name, revision=revision or made_for.revision)
    if not wanted.name:
        raise BaseModelError(f"adapter {expert.folder} does not name its base model", fix="--base BASE")
    if not wanted.matches(made_for):
        raise BaseModelError(
            f"adapter {expert.folder} was made for another base model",
            found=str(wanted),
            expected=str(made_for),
            fix="leave --base out",
        )
    return wanted


@contextmanager
def writable(expert: Expert) -> Iterator[Expert]:
    """Yield an expert whose folder may be written to.

    A pool's manifest has the checksums of its files: an expert inside a pool is
    copied, and the copy takes its place as a whole at the end. Of the processes
    of one training, the main one alone does so.
    """
    from phatgoose.experts.expert import Expert
    from phatgoose.experts.pool import containing_pool
    from phatgoose.training.run import is_main_process

    inside = containing_pool(expert.folder)
    if inside is None:
        yield expert
        return
    pool, name = inside
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / name
        copy.mkdir()
        for file in expert.files():
            shutil.copyfile(file, copy / file.name)
        yield Expert(copy)
        if is_main_process():
            pool.replace(name, copy)
