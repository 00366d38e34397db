"""The manifest of a pool: pool.json, which names the base model and the experts (docs/formats.md)."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phatgoose.errors import PoolError
from phatgoose.experts.adapter import CONFIG_FILE, WEIGHTS_FILE
from phatgoose.experts.expert import EXPERT_NAME
from phatgoose.files import write_json

MANIFEST_FILE = "pool.json"
EXPERTS = "experts"  # the folder that holds the experts' folders
FORMAT = 1
ADAPTER_ONLY = " (adapter only)"  # added to the source of an expert whose gate, or the like, is from elsewhere


@dataclass(frozen=True, kw_only=True)
class BaseId:
    """Which base model a pool is for.

    Attributes:
        name: hub id, path, or the name of an embedded base.
        revision: of the hub repository; None if it was not pinned.
    """

    name: str
    revision: str | None = None

    def matches(self, other: BaseId) -> bool:
        """Whether both can be the same model.

        Hub ids must be equal. A path only has its last part compared, because
        the same model lies in different places on different machines. An
        unknown name ("") and an unpinned revision match anything.
        """
        if self.revision and other.revision and self.revision != other.revision:
            return False
        if not self.name or not other.name or self.name == other.name:
            return True
        if _is_path(self.name) or _is_path(other.name):
            return Path(self.name).name == Path(other.name).name
        return False

    def __str__(self) -> str:
        return f"{self.name or '(unknown)'}{'@' + self.revision if self.revision else ''}"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One expert's line in the manifest.

    Attributes:
        name: unique in the pool.
        path: of its folder, relative to the pool; None if it stays on the hub.
        hub: {"repo", "revision"} of the hub repository it came from, or stays in.
        source: where it came from, for people.
        files: file name -> sha256.
    """

    name: str
    path: str | None
    hub: dict[str, str] | None
    source: str
    files: dict[str, str]

    def in_place_of(self, old: Entry) -> Entry:
        """This entry, with as much of an older one's origin as its files still have."""
        changed = {file for file, _ in old.files.items() ^ self.files.items()}
        if not changed:
            return replace(self, source=old.source, hub=old.hub)
        if not changed & {CONFIG_FILE, WEIGHTS_FILE}:
            return replace(self, source=old.source.removesuffix(ADAPTER_ONLY) + ADAPTER_ONLY)
        return self


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What pool.json says. It never changes; a changed pool has a new one.

    Attributes:
        base: the base model that all experts were trained on.
        entries: one line per expert, in the order of the expert ids.
    """

    base: BaseId
    entries: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the pool in `folder`.

        Raises:
            PoolError: there is none, or it is damaged.
        """
        path = folder / MANIFEST_FILE
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PoolError(
                f"{folder} is not a pool",
                found="no " + MANIFEST_FILE if folder.is_dir() else "a file" if folder.exists() else "no such folder",
                expected=MANIFEST_FILE,
                fix=f"phatgoose pool create {folder} --base BASE",
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PoolError(f"cannot read {path}", found=str(error), expected="JSON") from error
        return _parse(path, raw)

    def with_entries(self, entries: Iterable[Entry]) -> Manifest:
        """The same manifest with these lines."""
        return Manifest(base=self.base, entries=tuple(entries))

    def write(self, folder: Path) -> None:
        """Make this the manifest of the pool in `folder`, in one step."""
        experts = [asdict(entry) for entry in self.entries]
        write_json(folder / MANIFEST_FILE, {"format": FORMAT, "base": asdict(self.base), "experts": experts})

    @property
    def names(self) -> tuple[str, ...]:
        """Expert names; the position is the expert id."""
        return tuple(entry.name for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """sha256 over base, names and files of all experts."""
        content = [asdict(self.base), [[e.name, sorted(e.files.items())] for e in self.entries]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _parse(path: Path, raw: Any) -> Manifest:
    try:
        if raw["format"] != FORMAT:
            raise PoolError(
                f"{path} has an unknown format",
                found=str(raw["format"]),
                expected=str(FORMAT),
                fix="install the phatgoose that wrote it",
            )
        base = BaseId(**raw["base"])
        entries = tuple(Entry(**entry) for entry in raw["experts"])
    except (KeyError, TypeError) as error:
        raise PoolError(
            f"cannot read {path}",
            found=f"{type(error).__name__}: {error}",
            expected="format, base and experts",
            fix="restore it from a copy, or create the pool again",
        ) from error
    for entry in entries:
        _check_entry(path, entry)
    names = [entry.name for entry in entries]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise PoolError(
            f"{path} names two experts {double[0]!r}", expected="unique names", fix="rename one of them in the file"
        )
    return Manifest(base=base, entries=entries)


def _check_entry(path: Path, entry: Entry) -> None:
    """Refuse a line that code further on could not use, or that leads outside the pool."""
    texts = isinstance(entry.name, str) and isinstance(entry.files, dict) and isinstance(entry.path, str | None)
    if not texts or re.fullmatch(EXPERT_NAME, entry.name) is None:
        raise PoolError(
            f"cannot read {path}",
            found=f"expert with name {entry.name!r}, path {entry.path!r}, files {type(entry.files).__name__}",
            expected="a name of letters, digits, '.', '_' and '-', a path, and files with their sha256",
            fix="restore it from a copy, or create the pool again",
        )
    if entry.path is None:
        if not entry.hub or not {"repo", "revision"} <= entry.hub.keys():
            raise PoolError(
                f"{path}: expert {entry.name!r} has neither a path nor a hub repository",
                found=f"hub {entry.hub!r}",
                expected="hub with repo and revision",
            )
        return
    # A pool from a stranger must not read, or later sweep, outside its own folder.
    # The sweep compares text, so a path has one spelling.
    folder = entry.path.removeprefix(f"{EXPERTS}/")
    if folder == entry.path or "/" in folder or folder in ("", ".", ".."):
        raise PoolError(
            f"{path}: expert {entry.name!r} lies outside the pool",
            found=entry.path,
            expected=f"{EXPERTS}/<folder>",
        )


def _is_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).exists()
