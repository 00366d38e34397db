"""Files with one vector per site, beside an adapter: its gate, and its mean activations.

Each is a safetensors file, with its provenance in the metadata and, for people,
as JSON. PEFT ignores both, so the folder stays a valid adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phatgoose.errors import GateError, PhatgooseError, PrototypeError
from phatgoose.experts.adapter import WEIGHTS_FILE, Adapter
from phatgoose.experts.provenance import FORMAT, GateProvenance, VectorProvenance
from phatgoose.files import replacing, sha256, write_json


@dataclass(frozen=True, kw_only=True)
class VectorKind:
    """A kind of vector, its files, and the command that makes them.

    Attributes:
        noun: name of the kind in messages ("gate").
        file: name of the safetensors file; its tensors are named `<site><suffix>`.
        config_file: name of the JSON file, a copy of the provenance for people.
        suffix: end of every tensor name (".gate").
        command: command that makes the vectors ("phatgoose gate").
        error: exception for vectors that are missing or damaged.
    """

    noun: str
    file: str
    config_file: str
    suffix: str
    command: str
    error: type[PhatgooseError]

    def exists(self, folder: Path) -> bool:
        """Whether an adapter's folder has such a file; it may be damaged."""
        return (folder / self.file).is_file()

    def save(
        self,
        folder: Path,
        vectors: Mapping[str, torch.Tensor],
        provenance: VectorProvenance,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Write vectors beside an adapter, replacing older ones.

        Args:
            folder: the adapter's folder.
            vectors: site -> vector, shape (in-features,).
            provenance: how the vectors were made.
            dtype: dtype of the saved vectors.
        """
        tensors = {site + self.suffix: v.detach().to("cpu", dtype).contiguous() for site, v in sorted(vectors.items())}
        # One rename puts vectors and provenance in place together. A kill after it
        # leaves an old JSON file, which is only a copy for people.
        with replacing(folder / self.file) as temporary:
            save_file(tensors, temporary, metadata={"provenance": json.dumps(provenance.to_json())})
        write_json(folder / self.config_file, provenance.to_json())

    def load(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        """Read the vectors beside `adapter`.

        Returns:
            Site -> vector, shape (in-features,), fp32.

        Raises:
            PhatgooseError: an `error`: the vectors are missing, damaged, not finite, or for another adapter.
        """
        folder = adapter.folder
        again = f"{self.command} {folder} --data DATA"
        if not self.exists(folder):
            raise self.error(
                f"expert {folder} has no {self.noun}", found=f"no {self.file}", expected=self.file, fix=again
            )
        try:
            with safe_open(folder / self.file, framework="pt") as file:
                provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
                tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, json.JSONDecodeError) as error:
            raise self.error(
                f"cannot read {folder / self.file}", found=str(error), expected="a whole safetensors file", fix=again
            ) from error
        vectors = {key.removesuffix(self.suffix): v for key, v in tensors.items()}
        self._check_provenance(folder, provenance, again)
        self._check_vectors(adapter, vectors, again)
        return vectors

    def _check_provenance(self, folder: Path, provenance: Any, again: str) -> None:
        if not isinstance(provenance, dict) or provenance.get("format") != FORMAT:
            raise self.error(
                f"{folder / self.file} has an unknown format",
                found=str(provenance.get("format") if isinstance(provenance, dict) else provenance)[:60],
                expected=str(FORMAT),
                fix="install the phatgoose that wrote it, or " + again,
            )
        actual = sha256(folder / WEIGHTS_FILE)
        if provenance.get("adapter_sha256") != actual:
            raise self.error(
                f"the {self.noun} in {folder} was made for another adapter",
                found=f"{WEIGHTS_FILE} with sha256 {actual[:12]}",
                expected=f"sha256 {str(provenance.get('adapter_sha256'))[:12]}",
                fix=again,
            )

    def _check_vectors(self, adapter: Adapter, vectors: Mapping[str, torch.Tensor], again: str) -> None:
        unlike = sorted(set(vectors) ^ set(adapter.shapes))
        if unlike:
            where = f"the {self.noun} has no" if unlike[0] in adapter.shapes else "the adapter has no"
            raise self.error(
                f"the {self.noun} in {adapter.folder} does not fit its adapter",
                found=f"{where} site {unlike[0]} ({len(unlike)} such)",
                expected="one vector for each site of the adapter",
                fix=again,
            )
        for site, v in vectors.items():
            expected = (adapter.shapes[site].in_features,)
            if tuple(v.shape) != expected:
                raise self.error(
                    f"the {self.noun} in {adapter.folder} has a wrong shape at {site}",
                    found=str(tuple(v.shape)),
                    expected=str(expected),
                    fix=again,
                )
            if not torch.isfinite(v).all():
                raise self.error(
                    f"the {self.noun} in {adapter.folder} is not finite at {site}",
                    found="NaN or infinity",
                    expected="finite numbers",
                    fix=again,
                )


GATE = VectorKind(
    noun="gate",
    file="gate.safetensors",
    config_file="gate_config.json",
    suffix=".gate",
    command="phatgoose gate",
    error=GateError,
)

ACTIVATIONS = VectorKind(
    noun="mean activations",
    file="activations.safetensors",
    config_file="activations_config.json",
    suffix=".activation",
    command="phatgoose activations",
    error=PrototypeError,
)


def save_gate(
    folder: Path, vectors: Mapping[str, torch.Tensor], provenance: GateProvenance, dtype: torch.dtype = torch.float32
) -> None:
    """Write a gate beside an adapter, replacing an older one; see `VectorKind.save`."""
    GATE.save(folder, vectors, provenance, dtype)
