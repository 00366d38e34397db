"""Packs a seed's results folders and recordings into the rows that are published."""

from __future__ import annotations

import tarfile
from pathlib import Path


def pack(seed: Path, rows: Path) -> None:
    """One small archive per results folder, with equal bytes for equal rows; recordings are copied, being small."""
    rows.mkdir(parents=True, exist_ok=True)
    for folder in sorted(seed.glob("results*")):
        _archive(folder, rows / f"{seed.name}-{folder.name}.tar.xz")
    for folder in sorted(seed.glob("recording-*")):
        target = rows / f"{seed.name}-{folder.name}"
        target.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if not path.name.startswith("."):
                (target / path.name).write_bytes(path.read_bytes())


def _archive(folder: Path, target: Path) -> None:
    with tarfile.open(target, "w:xz") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                info = archive.gettarinfo(str(path), path.relative_to(folder).as_posix())
                info.mtime = info.uid = info.gid = 0
                info.uname = info.gname = ""
                with path.open("rb") as file:
                    archive.addfile(info, file)
