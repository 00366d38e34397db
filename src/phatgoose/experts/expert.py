"""An expert: a named adapter with, or still without, a gate."""

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
# What makes an expert; whatever else lies in its folder is not copied or hashed.
FILES = (
    CONFIG_FILE,
    WEIGHTS_FILE,
    GATE.file,
    GATE.config_file,
    ACTIVATIONS.file,
    ACTIVATIONS.config_file,
    EMBEDDINGS_FILE,
)
# what routers may need of an expert -> the file that holds it
NEEDED_FILES = {
    "adapter": WEIGHTS_FILE,
    "gate": GATE.file,
    "activations": ACTIVATIONS.file,
    "embeddings": EMBEDDINGS_FILE,
}


class Expert:
    """An adapter folder under a name. Opening reads configs and headers, not weights.

    Args:
        folder: a PEFT adapter's folder, with or without a gate.
        name: letters, digits, '.', '_' and '-'; the folder's name if None.

    Raises:
        AdapterError: the folder is not a LoRA adapter that can be routed.
        ConfigError: the name cannot be used.
    """

    def __init__(self, folder: str | Path, name: str | None = None) -> None:
        self.adapter = Adapter(folder)
        self.name = check_name(name if name is not None else self.adapter.folder.resolve().name)

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.adapter.folder

    @property
    def has_gate(self) -> bool:
        """Whether a gate lies beside the adapter."""
        return self.brings("gate")

    def brings(self, need: str) -> bool:
        """Whether the file for a need of a router (`NEEDED_FILES`) lies here, whole or not."""
        return (self.folder / NEEDED_FILES[need]).is_file()

    @property
    def shapes(self) -> Mapping[str, LoraShape]:
        """Site -> rank, in-features, out-features."""
        return self.adapter.shapes

    def load_gate(self) -> dict[str, torch.Tensor]:
        """Site -> gate vector (in-features,), fp32. Raises GateError."""
        return GATE.load(self.adapter)

    def load_activations(self) -> dict[str, torch.Tensor]:
        """Site -> mean activation (in-features,), fp32. Raises PrototypeError."""
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
    """Return `name` if an expert may be called so.

    Raises:
        ConfigError: it may not.
    """
    if re.fullmatch(EXPERT_NAME, name) is None:
        raise ConfigError(
            f"an expert cannot be named {name!r}",
            expected="letters, digits, '.', '_' and '-', beginning with a letter or digit",
            fix="give it another with --name",
        )
    return name
