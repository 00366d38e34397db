"""A pool: a folder with a manifest, pool.json, and the experts of one base model.

    pool.json
    experts/<name>/adapter_config.json, adapter_model.safetensors, gate.safetensors, ...

Every change ends with one rename of pool.json, so a killed command leaves
either the old pool or the new one. The next change deletes expert folders that
the manifest does not name.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from phatgoose.errors import PhatgooseError, PoolError
from phatgoose.experts.checks import check_base, check_entry, check_expert, check_name_is_free, check_new_folder
from phatgoose.experts.expert import Expert
from phatgoose.experts.manifest import EXPERTS, MANIFEST_FILE, BaseId, Entry, Manifest
from phatgoose.files import new_folder


class Pool:
    """A named set of experts for one base model. Expert ids are positions in `names`.

    Args:
        folder: the pool's folder.
        manifest: the content of its pool.json, or a part of it (see `subset`).

    Build one with `open`, `create` or `around`.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._experts: dict[str, Expert] = {}

    @classmethod
    def create(cls, folder: str | Path, base: str, revision: str | None = None) -> Pool:
        """Make an empty pool.

        Raises:
            PoolError: the folder exists and is not empty, or `base` is an empty name.
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
            PoolError: the folder has no manifest, or a damaged one.
        """
        return cls(Path(folder), Manifest.read(Path(folder)))

    @classmethod
    def around(cls, adapter: str | Path) -> Pool:
        """A pool of a single adapter, which stays where it is; nothing is written.

        Raises:
            AdapterError: the folder is not a LoRA adapter that can be routed.
            ConfigError: the folder's name is not a valid expert name.
        """
        expert = Expert(adapter)
        config, folder = expert.adapter.config, expert.folder.resolve()
        entry = Entry(name=expert.name, path=folder.name, hub=None, source=folder.name, files=expert.checksums())
        return cls(folder.parent, Manifest(base=BaseId(name=config.base, revision=config.revision), entries=(entry,)))

    @property
    def base(self) -> BaseId:
        """The base model that all experts were trained on."""
        return self.manifest.base

    @property
    def entries(self) -> tuple[Entry, ...]:
        """One manifest entry per expert; the position is the expert id."""
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
        """Open one expert; a linked one is downloaded from the hub unless it is cached.

        Raises:
            PoolError: the pool has no such expert, or the expert's folder is gone.
            AdapterError: the expert's folder is damaged.
            HubError: the download failed.
        """
        if name not in self._experts:
            self._experts[name] = Expert(self._expert_folder(self.entry(name)), name)
        return self._experts[name]

    def experts(self) -> list[Expert]:
        """All experts, opened; the position is the expert id.

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
        """The manifest entry of one expert. Raises PoolError if the pool has no such expert."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise PoolError(
            f"pool {self.folder} has no expert {name!r}",
            expected=", ".join(self.names) or "an expert; the pool is empty",
            fix=f"phatgoose pool list {self.folder}",
        )

    def subset(self, names: Sequence[str]) -> Pool:
        """A view of the pool with only these experts, in this order; the disk is unchanged."""
        return Pool(self.folder, self.manifest.with_entries(self.entry(name) for name in names))

    def with_expert(self, expert: Expert) -> Pool:
        """A view of the pool with one more expert, from any folder; the disk is unchanged.

        Raises:
            PoolError: the name is taken, or the adapter was trained on another base model.
        """
        check_name_is_free(self.folder, self.names, expert.name, expert.folder)
        check_base(self.folder, self.base, expert)
        folder = expert.folder.resolve()
        path = Path(os.path.relpath(folder, self.folder.resolve())).as_posix()
        entry = Entry(name=expert.name, path=path, hub=None, source=folder.name, files=expert.checksums())
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
            name: the expert's name in the pool; by default the folder's name.
            source: origin to show to people; by default the folder's name.
            hub: {"repo", "revision"} if the folder was downloaded from the hub.

        Raises:
            PoolError: the name is taken, or the adapter was trained on another base model.
            AdapterError, GateError, PrototypeError: the expert's files are damaged.
        """
        expert = Expert(adapter, name)
        with self._changing():
            check_name_is_free(self.folder, self.names, expert.name, adapter)
            check_expert(self.folder, self.base, expert)
            entry = self._copy_in(expert, source or expert.folder.resolve().name, hub)
            self._commit([*self.entries, entry])
        return entry

    def link(self, repo: str, name: str | None = None, revision: str | None = None) -> Entry:
        """Add an expert that stays on the hub: the manifest pins its commit and the sha256 of its files.

        Args:
            repo: hub repository (OWNER/NAME) of a PEFT adapter, with or without a gate.
            name: the expert's name in the pool; by default NAME of the repository.
            revision: branch, tag or commit; by default the main branch.

        Raises:
            PoolError: the name is taken, or the adapter was trained on another base model.
            AdapterError, GateError, PrototypeError: the expert's files are damaged.
            HubError: the download failed.
        """
        from phatgoose.experts.hub import download_expert, resolve_revision

        commit = resolve_revision(repo, revision)
        expert = Expert(download_expert(repo, commit), name if name is not None else repo.split("/")[-1])
        entry = Entry(
            name=expert.name,
            path=None,
            hub={"repo": repo, "revision": commit},
            source=f"{repo}@{commit}",
            files=expert.checksums(),
        )
        with self._changing():
            check_name_is_free(self.folder, self.names, expert.name, repo)
            check_expert(self.folder, self.base, expert)
            self._commit([*self.entries, entry])
        return entry

    def replace(self, name: str, adapter: str | Path) -> Entry:
        """Replace an expert by a new version in one step; it keeps its name and expert id.

        The new entry claims only the origin that its files still have: if the
        gate changed, `source` says so; if the adapter changed, `source` is the
        new folder. In both cases the expert no longer counts as the hub's.

        Args:
            name: the expert to replace.
            adapter: folder of the new version, a PEFT adapter with or without a gate.

        Raises:
            PoolError: the pool has no such expert, or the new version was trained on another base model.
            AdapterError, GateError, PrototypeError: the new files are damaged.
        """
        expert = Expert(adapter, name)
        with self._changing():
            old = self.entry(name)
            check_expert(self.folder, self.base, expert)
            entry = self._copy_in(expert, expert.folder.resolve().name, None).in_place_of(old)
            self._commit([entry if e.name == name else e for e in self.entries])
        return entry

    @contextmanager
    def editing(self, name: str) -> Iterator[Expert]:
        """Yield a copy of an expert to write to; on a clean exit it replaces the expert if its files changed.

        The manifest holds checksums, so files inside a pool never change in
        place. If several processes train one gate together, only the main one
        writes the gate; the copies of the others stay unchanged and are dropped.
        A linked expert becomes a copy inside the pool.

        Raises:
            PoolError, AdapterError, GateError, PrototypeError, HubError: see `expert` and `replace`.
        """
        original = self.expert(name)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / name
            folder.mkdir()
            copy = original.copy_to(folder)
            before = copy.checksums()
            yield copy
            if copy.checksums() != before:
                self.replace(name, folder)

    def remove(self, name: str) -> None:
        """Remove an expert and delete the pool's copy of it. Raises PoolError if there is no such expert."""
        with self._changing():
            gone = self.entry(name)
            self._commit([entry for entry in self.entries if entry is not gone])

    def check(self, model: Any | None = None) -> list[PhatgooseError]:
        """Find everything that is wrong with the pool: damaged or changed files, shapes that do not fit.

        Args:
            model: a base model to compare shapes with; without one, experts are compared with each other.

        Returns:
            At most one problem per expert, by expert id; empty if all is well. A
            missing gate is not a problem here (routers that need one check it).
        """
        problems: list[PhatgooseError] = []
        shapes: dict[str, tuple[str, int, int]] = {}
        for entry in self.entries:
            try:
                check_entry(self.folder, self.base, entry, self._expert_folder(entry), shapes, model)
            except PhatgooseError as error:
                problems.append(error)
        return problems

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
        folder = self.manifest.free_path(expert.name)
        with new_folder(self.folder / folder) as temporary:
            files = expert.copy_to(temporary).checksums()
        return Entry(name=expert.name, path=folder, hub=hub, source=source, files=files)

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the pool's lock, with the manifest as it is on disk now; clean up before and after."""
        with FileLock(self.folder / ".lock"):
            if (self.folder / MANIFEST_FILE).is_file():
                self.manifest = Manifest.read(self.folder)
            self._sweep()
            yield
            self._sweep()

    def _sweep(self) -> None:
        """Delete what a killed command left: expert folders that no entry names, and unfinished manifests."""
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
