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
ADAPTER_ONLY = " (adapter only)"  # marks a source that holds for the adapter, but not for the gate or the prototypes


@dataclass(frozen=True, kw_only=True)
class BaseId:
    """Identity of a base model.

    Attributes:
        name: hub id, path, or the name of an embedded base.
        revision: pinned revision of the hub repository; None if not pinned.
    """

    name: str
    revision: str | None = None

    def matches(self, other: BaseId) -> bool:
        """Whether both can name the same model.

        Hub ids must be equal. If either name is a path, only the last parts are
        compared, because paths differ between machines. An unknown name ("")
        and an unpinned revision match anything.
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
    """One expert in the manifest.

    Attributes:
        name: the expert's name, unique in the pool.
        path: the expert's folder, relative to the pool; None if it stays on the hub.
        hub: {"repo", "revision"} of the hub repository that holds the same files, or None.
        source: origin to show to people.
        files: file name -> sha256.
    """

    name: str
    path: str | None
    hub: dict[str, str] | None
    source: str
    files: dict[str, str]

    def in_place_of(self, old: Entry) -> Entry:
        """This entry, with the origin of the `old` one as far as it still holds for the files."""
        changed = {file for file, _ in old.files.items() ^ self.files.items()}
        if not changed:
            return replace(self, source=old.source, hub=old.hub)
        if not changed & {CONFIG_FILE, WEIGHTS_FILE}:
            return replace(self, source=old.source.removesuffix(ADAPTER_ONLY) + ADAPTER_ONLY)
        return self


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of pool.json, immutable: a changed pool has a new manifest.

    Attributes:
        base: the base model that all experts were trained on.
        entries: one entry per expert; the position is the expert id.
    """

    base: BaseId
    entries: tuple[Entry, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read the manifest of the pool in `folder`.

        Raises:
            PoolError: the folder has no manifest, or a damaged one.
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
        """A manifest with the same base and these entries."""
        return Manifest(base=self.base, entries=tuple(entries))

    def write(self, folder: Path) -> None:
        """Write pool.json in `folder`, replacing an older one in one step."""
        experts = [asdict(entry) for entry in self.entries]
        write_json(folder / MANIFEST_FILE, {"format": FORMAT, "base": asdict(self.base), "experts": experts})

    def free_path(self, name: str) -> str:
        """A path for the next version of expert `name`, which no entry uses."""
        taken = {entry.path for entry in self.entries}
        candidates = [f"{EXPERTS}/{name}", f"{EXPERTS}/{name}@2"]
        return next(path for path in candidates if path not in taken)

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
    """Raise PoolError for an entry with invalid values, or with a path that leads outside the pool."""
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
