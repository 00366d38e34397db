"""A gate on disk: gate.safetensors and gate_config.json beside a PEFT adapter.

The gate is one vector v (in-features long) per site of its adapter (paper
section 3). The folder stays a valid PEFT adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from phatgoose.adapter import Adapter
from phatgoose.errors import GateError
from phatgoose.site_vectors import FORMAT, VectorKind

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
        data: fingerprint of the training examples (`phatgoose.data.fingerprint`).
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
