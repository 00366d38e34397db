"""A pool: a folder with a manifest, pool.json, and the experts of one base model.

    pool.json
    experts/<name>/adapter_config.json, adapter_model.safetensors, gate.safetensors, ...

Every change is one rename of pool.json. A killed command leaves the old pool
or the new one; folders that no manifest names are swept by the next change.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.expert import EXPERT_NAME, Expert
from phatgoose.files import new_folder, sha256, write_json

MANIFEST = "pool.json"
EXPERTS = "experts"
FORMAT = 1


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


class Pool:
    """A named set of experts for one base model. Expert ids are positions in `names`.

    Args:
        folder: the pool's folder; see `open` and `create`.
        base: the base model that all experts were trained on.
        entries: the manifest's lines.
    """

    def __init__(self, folder: Path, base: BaseId, entries: Sequence[Entry]) -> None:
        self.folder = folder
        self.base = base
        self.entries = tuple(entries)
        self._experts: dict[str, Expert] = {}

    @classmethod
    def create(cls, folder: str | Path, base: str, revision: str | None = None) -> Pool:
        """Make an empty pool.

        Raises:
            PoolError: the folder exists and is not empty.
        """
        folder = Path(folder)
        check_new_folder(folder)
        pool = cls(folder, BaseId(name=base, revision=revision), ())
        with new_folder(folder) as temporary:
            write_json(temporary / MANIFEST, pool._manifest())
        return pool

    @classmethod
    def open(cls, folder: str | Path) -> Pool:
        """Read a pool's manifest.

        Raises:
            PoolError: there is none, or it is damaged.
        """
        folder = Path(folder)
        path = folder / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError) as error:
            raise PoolError(
                f"{folder} is not a pool",
                found="no " + MANIFEST if folder.is_dir() else "no such folder",
                expected=MANIFEST,
                fix=f"phatgoose pool create {folder} --base BASE",
            ) from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PoolError(f"cannot read {path}", found=str(error), expected="JSON") from error
        base, entries = _parse_manifest(path, raw)
        return cls(folder, base, entries)

    @property
    def names(self) -> tuple[str, ...]:
        """Expert names; the position is the expert id."""
        return tuple(entry.name for entry in self.entries)

    @property
    def fingerprint(self) -> str:
        """sha256 over base, names and files of all experts."""
        content = [asdict(self.base), [[e.name, sorted(e.files.items())] for e in self.entries]]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.entries)

    def expert(self, name: str) -> Expert:
        """Open one expert (an expert that stays on the hub is downloaded).

        Raises:
            PoolError: no such expert.
            AdapterError: its folder is damaged.
            HubError: it cannot be downloaded.
        """
        if name not in self._experts:
            self._experts[name] = Expert(self._expert_folder(self.entry(name)), name)
        return self._experts[name]

    def experts(self) -> list[Expert]:
        """All experts, by expert id.

        Raises:
            PoolError: the pool is empty.
        """
        if not self.entries:
            raise PoolError(
                f"pool {self.folder} is empty",
                expected="at least one expert",
                fix=f"phatgoose pool add {self.folder} ADAPTER",
            )
        return [self.expert(name) for name in self.names]

    def entry(self, name: str) -> Entry:
        """One line of the manifest. Raises PoolError if there is none of that name."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise PoolError(
            f"pool {self.folder} has no expert {name!r}",
            expected=", ".join(self.names) or "an expert; the pool is empty",
            fix=f"phatgoose pool list {self.folder}",
        )

    def subset(self, names: Sequence[str]) -> Pool:
        """The same pool with only these experts, in this order; nothing changes on disk."""
        return Pool(self.folder, self.base, [self.entry(name) for name in names])

    def add(
        self,
        adapter: str | Path,
        name: str | None = None,
        *,
        source: str | None = None,
        hub: dict[str, str] | None = None,
    ) -> Entry:
        """Copy an adapter, and its gate if it has one, into the pool.

        Args:
            adapter: a PEFT adapter's folder.
            name: in the pool; the folder's name if None.
            source: where it came from; the folder's name if None.
            hub: {"repo", "revision"} if the folder is a download of one.

        Raises:
            PoolError: the name is taken, or the adapter has another base or other shapes.
            AdapterError, GateError: its files are damaged.
        """
        expert = Expert(adapter, name)
        with self._changing():
            self._check_name_is_free(expert.name, adapter)
            self._check_expert(expert)
            entry = self._copy_in(expert, source or expert.folder.resolve().name, hub)
            self._commit([*self.entries, entry])
        return entry

    def link(self, repo: str, name: str | None = None, revision: str | None = None) -> Entry:
        """Add an expert that stays on the hub: the manifest pins its commit and its files' sha256.

        Args:
            repo: hub repository of a PEFT adapter, with or without a gate.
            name: in the pool; the last part of `repo` if None.
            revision: branch, tag or commit of the repository; its main branch if None.

        Raises:
            PoolError: the name is taken, or the adapter has another base.
            AdapterError, GateError: its files are damaged.
            HubError: it cannot be downloaded.
        """
        from phatgoose.hub import download_expert, resolve_revision

        commit = resolve_revision(repo, revision)
        expert = Expert(download_expert(repo, commit), name if name is not None else repo.split("/")[-1])
        entry = Entry(
            name=expert.name,
            path=None,
            hub={"repo": repo, "revision": commit},
            source=f"{repo}@{commit}",
            files={file.name: sha256(file) for file in sorted(expert.files())},
        )
        with self._changing():
            self._check_name_is_free(expert.name, repo)
            self._check_expert(expert)
            self._commit([*self.entries, entry])
        return entry

    def replace(self, name: str, adapter: str | Path) -> Entry:
        """Put a new version of an expert in the place of the old, as one step.

        Raises:
            PoolError: no such expert, or the new one does not fit.
            AdapterError, GateError: its files are damaged.
        """
        expert = Expert(adapter, name)
        with self._changing():
            old = self.entry(name)
            self._check_expert(expert)
            entry = self._copy_in(expert, old.source, old.hub)
            self._commit([entry if e.name == name else e for e in self.entries])
        return entry

    def remove(self, name: str) -> None:
        """Take an expert out and delete the pool's copy of it. Raises PoolError."""
        with self._changing():
            gone = self.entry(name)
            self._commit([entry for entry in self.entries if entry is not gone])

    def check(self, model: Any | None = None) -> list[PhatgooseError]:
        """Everything that is wrong with this pool: damaged or changed files, wrong shapes.

        Args:
            model: a base model to compare shapes with, if there is one at hand.

        Returns:
            The problems, in the order of the experts; empty if all is well. An
            expert without a gate is no problem (routers that need one say so).
        """
        problems: list[PhatgooseError] = []
        shapes: dict[str, tuple[str, int, int]] = {}
        for entry in self.entries:
            try:
                self._check_entry(entry, shapes, model)
            except PhatgooseError as error:
                problems.append(error)
        return problems

    def _check_entry(self, entry: Entry, shapes: dict[str, tuple[str, int, int]], model: Any | None) -> None:
        folder = self._expert_folder(entry)
        for name, expected in entry.files.items():
            path = folder / name
            found = sha256(path)[:12] if path.is_file() else "no such file"
            if found != expected[:12]:
                raise PoolError(
                    f"expert {entry.name!r}: {name} is not the file that was added",
                    found=found,
                    expected=f"sha256 {expected[:12]}",
                    fix=f"phatgoose pool remove {self.folder} {entry.name}, then add it again",
                )
        expert = Expert(folder, entry.name)
        self._check_fits(expert)
        for site, shape in expert.shapes.items():
            owner, *known = shapes.setdefault(site, (entry.name, shape.in_features, shape.out_features))
            if known != [shape.in_features, shape.out_features]:
                raise PoolError(
                    f"experts {owner!r} and {entry.name!r} were made for different base models",
                    found=f"{site}: {known} and {[shape.in_features, shape.out_features]}",
                    expected="one shape per site",
                    fix=f"phatgoose pool remove {self.folder} {entry.name}",
                )
        _check_tensors(expert)
        if model is not None:
            from phatgoose.sites import check_sites

            check_sites(model, [expert])

    def _check_name_is_free(self, name: str, adapter: str | Path) -> None:
        if name in self.names:
            raise PoolError(
                f"pool {self.folder} already has an expert {name!r}",
                expected="a new name",
                fix=f"phatgoose pool add {self.folder} {adapter} --name OTHER, "
                f"or first: phatgoose pool remove {self.folder} {name}",
            )

    def _check_expert(self, expert: Expert) -> None:
        self._check_fits(expert)
        _check_tensors(expert)

    def _check_fits(self, expert: Expert) -> None:
        config = expert.adapter.config
        theirs = BaseId(name=config.base, revision=config.revision)
        if not self.base.matches(theirs):
            raise PoolError(
                f"expert {expert.name!r} was made for another base model than pool {self.folder}",
                found=str(theirs),
                expected=str(self.base),
                fix=f"phatgoose pool create OTHER --base {theirs}",
            )

    def _expert_folder(self, entry: Entry) -> Path:
        if entry.path is not None:
            return self.folder / entry.path
        from phatgoose.hub import download_expert

        assert entry.hub is not None
        return download_expert(entry.hub["repo"], entry.hub["revision"])

    def _copy_in(self, expert: Expert, source: str, hub: dict[str, str] | None) -> Entry:
        folder = self._free_folder(expert.name)
        with new_folder(self.folder / folder) as temporary:
            for file in expert.files():
                shutil.copyfile(file, temporary / file.name)
            files = {file.name: sha256(file) for file in sorted(temporary.iterdir())}
        return Entry(name=expert.name, path=folder, hub=hub, source=source, files=files)

    def _free_folder(self, name: str) -> str:
        taken = {entry.path for entry in self.entries}
        candidates = [f"{EXPERTS}/{name}", f"{EXPERTS}/{name}@2"]
        return next(path for path in candidates if path not in taken)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One writer at a time, working on the manifest as it is now."""
        with FileLock(self.folder / ".lock"):
            if (self.folder / MANIFEST).is_file():
                self.entries = Pool.open(self.folder).entries
            self._sweep()
            yield
            self._sweep()

    def _sweep(self) -> None:
        """Delete what a killed command left: expert folders that no entry names, an unfinished manifest."""
        for unfinished in self.folder.glob(f".{MANIFEST}.*"):
            unfinished.unlink(missing_ok=True)
        named = {entry.path for entry in self.entries}
        for folder in (self.folder / EXPERTS).glob("*"):
            if folder.relative_to(self.folder).as_posix() not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, entries: Sequence[Entry]) -> None:
        changed = Pool(self.folder, self.base, entries)
        write_json(self.folder / MANIFEST, changed._manifest())
        self.entries = changed.entries
        self._experts.clear()

    def _manifest(self) -> dict[str, Any]:
        return {"format": FORMAT, "base": asdict(self.base), "experts": [asdict(entry) for entry in self.entries]}


def containing_pool(folder: Path) -> tuple[Pool, str] | None:
    """The pool that `folder` is an expert of, and the expert's name; None if it is in none."""
    folder = folder.resolve()
    root = folder.parent.parent
    if not (root / MANIFEST).is_file():
        return None
    pool = Pool.open(root)
    for entry in pool.entries:
        if entry.path is not None and (root / entry.path) == folder:
            return pool, entry.name
    return None


def check_new_folder(folder: Path) -> None:
    """Raise PoolError unless a new pool may be made at `folder`: nothing, or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PoolError(
            f"cannot create a pool in {folder}",
            found="a pool" if (folder / MANIFEST).is_file() else "a file, or a folder that is not empty",
            expected="no folder, or an empty one",
            fix="choose another folder",
        )


def _check_tensors(expert: Expert) -> None:
    # reads every tensor once, so that damaged weights stay out
    for _ in expert.adapter.load():
        pass
    if expert.has_gate:
        expert.load_gate()


def _parse_manifest(path: Path, raw: Any) -> tuple[BaseId, list[Entry]]:
    try:
        if raw["format"] != FORMAT:
            raise PoolError(
                f"{path} has an unknown format",
                found=str(raw["format"]),
                expected=str(FORMAT),
                fix="install the phatgoose that wrote it",
            )
        base = BaseId(**raw["base"])
        entries = [Entry(**entry) for entry in raw["experts"]]
        names = [entry.name for entry in entries]
    except (KeyError, TypeError) as error:
        raise PoolError(
            f"cannot read {path}",
            found=f"{type(error).__name__}: {error}",
            expected="format, base and experts",
            fix="restore it from a copy, or create the pool again",
        ) from error
    for entry in entries:
        _check_entry(path, entry)
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise PoolError(
            f"{path} names two experts {double[0]!r}", expected="unique names", fix="rename one of them in the file"
        )
    return base, entries


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
