"""What a pool asks of its experts: the right base, one shape per site, whole files, finite numbers."""

from __future__ import annotations

from pathlib import Path

from phatgoose.errors import BaseModelError, PoolError
from phatgoose.experts.embeddings import ENCODER, load_embeddings
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import BaseId, Entry
from phatgoose.files import sha256


def check_base(pool: Path, base: BaseId, expert: Expert) -> None:
    """Check that an expert was made for the base of the pool in folder `pool`. Raises PoolError."""
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
    """The base model to load for the pool in folder `pool`: `name`, or the one that the pool names.

    Raises:
        BaseModelError: they are two models.
    """
    if name is not None and not base.matches(BaseId(name=name)):
        raise BaseModelError(
            f"pool {pool} is for another base model", found=name, expected=str(base), fix="leave --base out"
        )
    return name or base.name


def check_tensors(expert: Expert) -> None:
    """Read every tensor of an expert once, so that damaged weights stay out. Raises AdapterError, GateError."""
    for _ in expert.adapter.load():
        pass
    if expert.has_gate:
        expert.load_gate()
    if expert.brings("activations"):
        expert.load_activations()
    if expert.brings("embeddings"):
        load_embeddings(expert.folder, ENCODER)


def check_files(pool: Path, entry: Entry, folder: Path) -> None:
    """Check that an expert's `folder` holds the files that its entry names. Raises PoolError."""
    for name, expected in entry.files.items():
        path = folder / name
        found = sha256(path)[:12] if path.is_file() else "no such file"
        if found != expected[:12]:
            raise PoolError(
                f"expert {entry.name!r}: {name} is not the file that was added",
                found=found,
                expected=f"sha256 {expected[:12]}",
                fix=f"phatgoose pool remove {pool} {entry.name}, then add it again",
            )


def check_shapes(pool: Path, expert: Expert, known: dict[str, tuple[str, int, int]]) -> None:
    """Check an expert's feature counts against those of the experts before it. Raises PoolError.

    Args:
        pool: the pool's folder.
        expert: the next one.
        known: site -> (expert, in-features, out-features) of those before; gets this expert's new sites.
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
