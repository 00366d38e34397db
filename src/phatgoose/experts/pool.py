"""A pool: a folder with a manifest, pool.json, and the experts of one base model.

    pool.json
    experts/<name>/adapter_config.json, adapter_model.safetensors, gate.safetensors, ...

Every change is one rename of pool.json. A killed command leaves the old pool
or the new one; folders that no manifest names are swept by the next change.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.checks import check_base, check_files, check_shapes, check_tensors
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import EXPERTS, MANIFEST_FILE, BaseId, Entry, Manifest
from phatgoose.files import new_folder, sha256


class Pool:
    """A named set of experts for one base model. Expert ids are positions in `names`.

    Args:
        folder: the pool's folder; see `open` and `create`.
        manifest: what its pool.json says, or a part of that; see `subset`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._experts: dict[str, Expert] = {}

    @classmethod
    def create(cls, folder: str | Path, base: str, revision: str | None = None) -> Pool:
        """Make an empty pool.

        Raises:
            PoolError: the folder exists and is not empty, or `base` is.
        """
        folder = Path(folder)
        check_new_folder(folder)
        if not base:
            raise PoolError(
                f"pool {folder} needs a base model", expected="its hub id, or its folder", fix="--base BASE"
            )
        manifest = Manifest(base=BaseId(name=base, revision=revision))
        with new_folder(folder) as temporary:
            manifest.write(temporary)
        return cls(folder, manifest)

    @classmethod
    def open(cls, folder: str | Path) -> Pool:
        """Read a pool's manifest.

        Raises:
            PoolError: there is none, or it is damaged.
        """
        return cls(Path(folder), Manifest.read(Path(folder)))

    @classmethod
    def around(cls, adapter: str | Path) -> Pool:
        """A pool of one adapter, which stays where it lies; nothing is written.

        Raises:
            AdapterError: the folder is not a LoRA adapter that can be routed.
            ConfigError: an expert may not be called as the folder is.
        """
        expert = Expert(adapter)
        config, folder = expert.adapter.config, expert.folder.resolve()
        files = {file.name: sha256(file) for file in sorted(expert.files())}
        entry = Entry(name=expert.name, path=folder.name, hub=None, source=folder.name, files=files)
        return cls(folder.parent, Manifest(base=BaseId(name=config.base, revision=config.revision), entries=(entry,)))

    @property
    def base(self) -> BaseId:
        """The base model that all experts were trained on."""
        return self.manifest.base

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The manifest's lines, by expert id."""
        return self.manifest.entries

    @property
    def names(self) -> tuple[str, ...]:
        """Expert names; the position is the expert id."""
        return self.manifest.names

    @property
    def fingerprint(self) -> str:
        """sha256 over base, names and files of all experts."""
        return self.manifest.fingerprint

    def __len__(self) -> int:
        return len(self.entries)

    def expert(self, name: str) -> Expert:
        """Open one expert (an expert that stays on the hub is downloaded).

        Raises:
            PoolError: no such expert, or its folder is gone.
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
        return Pool(self.folder, self.manifest.with_entries(self.entry(name) for name in names))

    def with_expert(self, expert: Expert) -> Pool:
        """The same pool and one expert more, wherever its folder lies; nothing changes on disk.

        Raises:
            PoolError: the name is taken, or the adapter has another base.
        """
        self._check_name_is_free(expert.name, expert.folder)
        check_base(self.folder, self.base, expert)
        folder = expert.folder.resolve()
        path = Path(os.path.relpath(folder, self.folder.resolve())).as_posix()
        files = {file.name: sha256(file) for file in sorted(expert.files())}
        entry = Entry(name=expert.name, path=path, hub=None, source=folder.name, files=files)
        return Pool(self.folder, self.manifest.with_entries([*self.entries, entry]))

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
            PoolError: the name is taken, or the adapter has another base.
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
        from phatgoose.experts.hub import download_expert, resolve_revision

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

        Its entry does not claim to come from where the old one came from: a
        changed gate is told in `source`, a changed adapter has the new folder
        as its source, and neither is the hub's any longer.

        Args:
            name: of the expert; it keeps its expert id.
            adapter: a PEFT adapter's folder, with or without a gate.

        Raises:
            PoolError: no such expert, or the new one does not fit.
            AdapterError, GateError: its files are damaged.
        """
        expert = Expert(adapter, name)
        with self._changing():
            old = self.entry(name)
            self._check_expert(expert)
            entry = self._copy_in(expert, expert.folder.resolve().name, None).in_place_of(old)
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
        check_files(self.folder, entry, folder)
        expert = Expert(folder, entry.name)
        self._check_expert(expert)
        check_shapes(self.folder, expert, shapes)
        if model is not None:
            from phatgoose.experts.sites import check_sites

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
        check_base(self.folder, self.base, expert)
        check_tensors(expert)

    def _expert_folder(self, entry: Entry) -> Path:
        if entry.path is not None:
            folder = self.folder / entry.path
            if not folder.is_dir():
                raise PoolError(
                    f"pool {self.folder} has lost expert {entry.name!r}",
                    found=f"no folder {entry.path}",
                    expected="the files that were added",
                    fix=f"phatgoose pool remove {self.folder} {entry.name}, then add it again",
                )
            return folder
        from phatgoose.experts.hub import download_expert

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
            if (self.folder / MANIFEST_FILE).is_file():
                self.manifest = Manifest.read(self.folder)
            self._sweep()
            yield
            self._sweep()

    def _sweep(self) -> None:
        """Delete what a killed command left: expert folders that no entry names, an unfinished manifest."""
        for unfinished in self.folder.glob(f".{MANIFEST_FILE}.*"):
            unfinished.unlink(missing_ok=True)
        named = {entry.path for entry in self.entries}
        for folder in (self.folder / EXPERTS).glob("*"):
            if folder.relative_to(self.folder).as_posix() not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def _commit(self, entries: Sequence[Entry]) -> None:
        changed = self.manifest.with_entries(entries)
        changed.write(self.folder)
        self.manifest = changed
        self._experts.clear()


def containing_pool(folder: Path) -> tuple[Pool, str] | None:
    """The pool that `folder` is an expert of, and the expert's name; None if it is in none."""
    folder = folder.resolve()
    root = folder.parent.parent
    if not (root / MANIFEST_FILE).is_file():
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
            found="a pool" if (folder / MANIFEST_FILE).is_file() else "a file, or a folder that is not empty",
            expected="no folder, or an empty one",
            fix="choose another folder",
        )
