"""A gate on disk: gate.safetensors and gate_config.json beside a PEFT adapter.

The gate is one vector v (in-features long) per site of its adapter (paper
section 3). The folder stays a valid PEFT adapter.
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

from phatgoose.adapter import WEIGHTS_FILE, Adapter
from phatgoose.errors import GateError
from phatgoose.files import replacing, sha256, write_json

GATE_FILE = "gate.safetensors"
GATE_CONFIG_FILE = "gate_config.json"
SUFFIX = ".gate"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class GateProvenance:
    """How a gate was made; the content of gate_config.json.

    Attributes:
        base: name of the base model, and its revision.
        data: fingerprint of the training examples (`phatgoose.data.fingerprint`).
        adapter_sha256: of the adapter_model.safetensors that it was trained for.
        settings: every setting of the training (`GateConfig`, `TextConfig`).
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


def has_gate(folder: Path) -> bool:
    """Whether an adapter's folder holds a gate (whole or not)."""
    return (folder / GATE_FILE).is_file()


def save_gate(
    folder: Path, vectors: Mapping[str, torch.Tensor], provenance: GateProvenance, dtype: torch.dtype = torch.float32
) -> None:
    """Write a gate beside an adapter, replacing an older one.

    Args:
        folder: the adapter's folder.
        vectors: site -> v, shape (in-features,).
        provenance: how it was made.
        dtype: of the numbers on disk.
    """
    tensors = {site + SUFFIX: v.detach().to("cpu", dtype).contiguous() for site, v in sorted(vectors.items())}
    # One rename puts vectors and provenance in place together; gate_config.json
    # is a copy for people to read, and what a kill between the two leaves old.
    with replacing(folder / GATE_FILE) as temporary:
        save_file(tensors, temporary, metadata={"provenance": json.dumps(asdict(provenance))})
    write_json(folder / GATE_CONFIG_FILE, asdict(provenance))


def load_gate(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Read the gate that lies beside `adapter`.

    Returns:
        site -> v, shape (in-features,), fp32.

    Raises:
        GateError: missing, damaged, not finite, or made for another adapter.
    """
    folder = adapter.folder
    again = f"phatgoose gate {folder} --data DATA"
    if not has_gate(folder):
        raise GateError(f"expert {folder} has no gate", found=f"no {GATE_FILE}", expected=GATE_FILE, fix=again)
    try:
        with safe_open(folder / GATE_FILE, framework="pt") as file:
            provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
            vectors = {key.removesuffix(SUFFIX): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError) as error:
        raise GateError(
            f"cannot read {folder / GATE_FILE}", found=str(error), expected="a whole safetensors file", fix=again
        ) from error
    _check_provenance(folder, provenance, again)
    _check_vectors(adapter, vectors, again)
    return vectors


def _check_provenance(folder: Path, provenance: Any, again: str) -> None:
    if not isinstance(provenance, dict) or provenance.get("format") != FORMAT:
        raise GateError(
            f"{folder / GATE_FILE} has an unknown format",
            found=str(provenance.get("format") if isinstance(provenance, dict) else provenance)[:60],
            expected=str(FORMAT),
            fix="install the phatgoose that wrote it, or " + again,
        )
    actual = sha256(folder / WEIGHTS_FILE)
    if provenance.get("adapter_sha256") != actual:
        raise GateError(
            f"the gate in {folder} was trained for another adapter",
            found=f"{WEIGHTS_FILE} with sha256 {actual[:12]}",
            expected=f"sha256 {str(provenance.get('adapter_sha256'))[:12]}",
            fix=again,
        )


def _check_vectors(adapter: Adapter, vectors: Mapping[str, torch.Tensor], again: str) -> None:
    unlike = sorted(set(vectors) ^ set(adapter.shapes))
    if unlike:
        where = "the gate has no" if unlike[0] in adapter.shapes else "the adapter has no"
        raise GateError(
            f"the gate in {adapter.folder} does not fit its adapter",
            found=f"{where} site {unlike[0]} ({len(unlike)} such)",
            expected="one vector for each site of the adapter",
            fix=again,
        )
    for site, v in vectors.items():
        expected = (adapter.shapes[site].in_features,)
        if tuple(v.shape) != expected:
            raise GateError(
                f"the gate in {adapter.folder} has a wrong shape at {site}",
                found=str(tuple(v.shape)),
                expected=str(expected),
                fix=again,
            )
        if not torch.isfinite(v).all():
            raise GateError(
                f"the gate in {adapter.folder} is not finite at {site}",
                found="NaN or infinity",
                expected="finite numbers",
                fix=again + " --learning-rate, lower than before",
            )
