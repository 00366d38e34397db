"""Mean activations on disk: activations.safetensors and activations_config.json beside a PEFT adapter.

One vector (in-features long) per site of the adapter: the mean of what enters
the site when the expert reads its own examples. The prototypes of the paper's
baseline Average Activation (section 4.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phatgoose.errors import PrototypeError
from phatgoose.site_vectors import FORMAT, VectorKind

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
        data: fingerprint of the examples (`phatgoose.data.fingerprint`).
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
