"""An expert: a named adapter, with or without a gate and prototypes beside it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from phatgoose.errors import ConfigError
from phatgoose.experts.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter, LoraShape
from phatgoose.experts.embeddings import EMBEDDINGS_FILE
from phatgoose.experts.vectors import ACTIVATIONS, GATE
from phatgoose.files import sha256

EXPERT_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
# the files of an expert; no other file in its folder is copied or hashed
FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    GATE.file,
    GATE.config_file,
    ACTIVATIONS.file,
    ACTIVATIONS.config_file,
    EMBEDDINGS_FILE,
)
# what a router may need from an expert -> the file that provides it
NEEDED_FILES = {
    "adapter": WEIGHTS_FILE,
    "gate": GATE.file,
    "activations": ACTIVATIONS.file,
    "embeddings": EMBEDDINGS_FILE,
}


class Expert:
    """A PEFT adapter's folder and a name. Opening it reads configs and headers, not weights.

    Args:
        folder: a PEFT adapter's folder, with or without a gate.
        name: letters, digits, '.', '_' and '-'; by default the folder's name.

    Raises:
        AdapterError: the folder is not a LoRA adapter that can be routed.
        ConfigError: the name has other characters.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.adapter = Adapter(folder)
        self.name = check_name(name if name is not None else self.adapter.folder.resolve().name)

    @property
    def folder(self) -> Path:
        """The folder that holds the expert's files."""
        return self.adapter.folder

    @property
    def has_gate(self) -> bool:
        """Whether the expert has a gate file; it may be damaged."""
        return self.brings("gate")

    def brings(self, need: str) -> bool:
        """Whether the expert has the file for a router's need (a key of `NEEDED_FILES`); it may be damaged."""
        return (self.folder / NEEDED_FILES[need]).is_file()

    @property
    def shapes(self) -> Mapping[str, LoraShape]:
        """Site -> rank, in-features, out-features."""
        return self.adapter.shapes

    def load_gate(self) -> dict[str, torch.Tensor]:
        """Site -> gate vector, shape (in-features,), fp32. Raises GateError if missing or damaged."""
        return GATE.load(self.adapter)

    def load_activations(self) -> dict[str, torch.Tensor]:
        """Site -> mean activation, shape (in-features,), fp32. Raises PrototypeError if missing or damaged."""
        return ACTIVATIONS.load(self.adapter)

    def files(self) -> list[Path]:
        """Paths of the expert's files; other files in its folder do not belong to it."""
        return [self.folder / name for name in FILES if (self.folder / name).is_file()]

    def checksums(self) -> dict[str, str]:
        """File name -> sha256 of each of the expert's files, sorted by name."""
        return {file.name: sha256(file) for file in sorted(self.files())}

    def copy_to(self, folder: Path) -> Expert:
        """Copy the expert's files into an existing folder and open the copy, under the same name."""
        for file in self.files():
            shutil.copyfile(file, folder / file.name)
        return Expert(folder, self.name)


def check_name(name: str) -> str:
    """Return `name` if it is a valid expert name.

    Raises:
        ConfigError: it is not.
    """
    if re.fullmatch(EXPERT_NAME, name) is None:
        raise ConfigError(
            f"an expert cannot be named {name!r}",
            expected="letters, digits, '.', '_' and '-', beginning with a letter or digit",
            fix="give another name with --name",
        )
    return name
