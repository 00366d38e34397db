"""One vector per site beside an adapter: a safetensors file, and its provenance as JSON.

Gates and mean activations are kept so. The folder stays a valid PEFT adapter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phatgoose.errors import GateError, PhatgooseError, PrototypeError
from phatgoose.experts.adapter import WEIGHTS_FILE, Adapter
from phatgoose.files import replacing, sha256, write_json

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class VectorKind:
    """A kind of vector: what it is called, where it lies, how it is made.

    Attributes:
        noun: for messages ("gate").
        file: name of the safetensors file; `<site><suffix>` are its tensors.
        config_file: name of the JSON file, a copy of the provenance for people.
        suffix: of the tensors' names.
        command: that makes the vectors of an expert ("phatgoose gate").
        error: what is raised if they cannot be used.
    """

    noun: str
    file: str
    config_file: str
    suffix: str
    command: str
    error: type[PhatgooseError]

    def exists(self, folder: Path) -> bool:
        """Whether an adapter's folder holds such a file (whole or not)."""
        return (folder / self.file).is_file()

    def save(
        self, folder: Path, vectors: Mapping[str, torch.Tensor], provenance: dict[str, Any], dtype: torch.dtype
    ) -> None:
        """Write vectors beside an adapter, replacing older ones.

        Args:
            folder: the adapter's folder.
            vectors: site -> vector, shape (in-features,).
            provenance: plain data; has `format` and `adapter_sha256`.
            dtype: of the numbers on disk.
        """
        tensors = {site + self.suffix: v.detach().to("cpu", dtype).contiguous() for site, v in sorted(vectors.items())}
        # One rename puts vectors and provenance in place together; the JSON file
        # is a copy for people to read, and what a kill between the two leaves old.
        with replacing(folder / self.file) as temporary:
            save_file(tensors, temporary, metadata={"provenance": json.dumps(provenance)})
        write_json(folder / self.config_file, provenance)

    def load(self, adapter: Adapter) -> dict[str, torch.Tensor]:
        """Read the vectors that lie beside `adapter`.

        Returns:
            site -> vector, shape (in-features,), fp32.

        Raises:
            PhatgooseError: of class `error`: missing, damaged, not finite, or made for another adapter.
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
GATE_FILE = GATE.file
GATE_CONFIG_FILE = GATE.config_file


@dataclass(frozen=True, kw_only=True)
class GateProvenance:
    """How a gate was made; the content of gate_config.json.

    Attributes:
        base: name of the base model, and its revision.
        data: fingerprint of the training examples (`phatgoose.data.examples.fingerprint`).
        adapter_sha256: of the adapter_model.safetensors that it was trained for.
        settings: every setting of the training (`TextConfig`, and `GateConfig`
            or, of a gate that was trained together with its adapter, `AdapterTrainingConfig`).
        phatgoose: version that wrote it.
        format: version of the file format.
    """

    base: str
    revision: str | None
    data: str | None
    adapter_sha256: str
    steps: int
    learning_rate: float
    seed: int
    settings: dict[str, Any]
    phatgoose: str
    format: int = FORMAT


def save_gate(
    folder: Path, vectors: Mapping[str, torch.Tensor], provenance: GateProvenance, dtype: torch.dtype = torch.float32
) -> None:
    """Write a gate (site -> v, shape (in-features,)) beside an adapter, replacing an older one."""
    GATE.save(folder, vectors, asdict(provenance), dtype)


def load_gate(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Read the gate beside `adapter`: site -> v, shape (in-features,), fp32. Raises GateError."""
    return GATE.load(adapter)


ACTIVATIONS = VectorKind(
    noun="mean activations",
    file="activations.safetensors",
    config_file="activations_config.json",
    suffix=".activation",
    command="phatgoose activations",
    error=PrototypeError,
)


@dataclass(frozen=True, kw_only=True)
class ActivationsProvenance:
    """How mean activations were made; the content of activations_config.json.

    Attributes:
        base: name of the base model, and its revision.
        data: fingerprint of the examples (`phatgoose.data.examples.fingerprint`).
        adapter_sha256: of the adapter that was active meanwhile.
        num_examples: that were read.
        settings: seed and `TextConfig`.
        phatgoose: version that wrote it.
        format: version of the file format.
    """

    base: str
    revision: str | None
    data: str
    adapter_sha256: str
    num_examples: int
    settings: dict[str, Any]
    phatgoose: str
    format: int = FORMAT
