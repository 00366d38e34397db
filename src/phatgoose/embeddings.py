"""Embeddings of an expert's examples: embeddings.safetensors beside a PEFT adapter.

What the paper's baseline Retrieval (section 4.2) and GLIDER's idea need of an
expert. The texts themselves stay with their owner. Axes: M examples, D features.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phatgoose.errors import PrototypeError
from phatgoose.files import replacing

EMBEDDINGS_FILE = "embeddings.safetensors"
FORMAT = 1
_TENSOR = "embeddings"


@dataclass(frozen=True, kw_only=True)
class EmbeddingsProvenance:
    """How embeddings were made; in the file's metadata.

    Attributes:
        encoder: name of the sentence encoder.
        data: fingerprint of the examples (`phatgoose.data.fingerprint`).
        num_examples: M.
        seed: of the sample.
        phatgoose: version that wrote it.
        format: version of the file format.
    """

    encoder: str
    data: str
    num_examples: int
    seed: int
    phatgoose: str
    format: int = FORMAT


def save_embeddings(folder: Path, embeddings_MD: torch.Tensor, provenance: EmbeddingsProvenance) -> None:
    """Write unit-length embeddings (M, D) beside an adapter, replacing older ones."""
    with replacing(folder / EMBEDDINGS_FILE) as temporary:
        save_file(
            {_TENSOR: embeddings_MD.float().cpu().contiguous()},
            temporary,
            metadata={"provenance": json.dumps(asdict(provenance))},
        )


def load_embeddings(folder: Path, encoder: str) -> torch.Tensor:
    """Read the embeddings beside an adapter.

    Args:
        folder: the adapter's.
        encoder: that the prompts will be embedded with.

    Returns:
        embeddings_MD, fp32, unit length.

    Raises:
        PrototypeError: missing, damaged, not finite, or made with another encoder.
    """
    again = f"phatgoose embeddings {folder} --data DATA"
    path = folder / EMBEDDINGS_FILE
    if not path.is_file():
        raise PrototypeError(
            f"expert {folder} has no embeddings", found=f"no {EMBEDDINGS_FILE}", expected=EMBEDDINGS_FILE, fix=again
        )
    try:
        with safe_open(path, framework="pt") as file:
            provenance = json.loads((file.metadata() or {}).get("provenance", "{}"))
            embeddings_MD = file.get_tensor(_TENSOR).float()
    except (SafetensorError, json.JSONDecodeError) as error:
        raise PrototypeError(
            f"cannot read {path}", found=str(error), expected="a whole safetensors file", fix=again
        ) from error
    if not isinstance(provenance, dict) or (provenance.get("format"), provenance.get("encoder")) != (FORMAT, encoder):
        raise PrototypeError(
            f"{path} was made with another encoder or format",
            found=str(provenance)[:120],
            expected=f"format {FORMAT}, encoder {encoder}",
            fix=again,
        )
    if embeddings_MD.dim() != 2 or not len(embeddings_MD) or not torch.isfinite(embeddings_MD).all():
        raise PrototypeError(
            f"{path} holds no finite matrix",
            found=f"shape {tuple(embeddings_MD.shape)}",
            expected="(examples, features), finite",
            fix=again,
        )
    return embeddings_MD
