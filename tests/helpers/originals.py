"""Folders that cost more to make than to copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from helpers.checks import files_of


class Originals:
    """Folders that are made once in a process. Nobody writes there: tests get copies."""

    def __init__(self) -> None:
        self.folder = TemporaryDirectory(prefix="phatgoose-tests-")
        self.made: dict[Hashable, Path] = {}
        self.files: dict[Path, dict[str, str]] = {}

    def copy(self, key: Hashable, make: Callable[[Path], object], folder: Path) -> None:
        """Copy into `folder` what `make` puts into an empty one; equal keys are equal contents."""
        if key not in self.made:
            original = Path(self.folder.name) / str(len(self.made))
            make(original)
            self.made[key], self.files[original] = original, files_of(original)
        shutil.copytree(self.made[key], folder, dirs_exist_ok=True)
        torch.manual_seed(0)  # what follows draws the same numbers whether or not the original was there

    def changed(self) -> list[Hashable]:
        return [key for key, original in self.made.items() if files_of(original) != self.files[original]]


@cache
def originals() -> Originals:
    return Originals()
