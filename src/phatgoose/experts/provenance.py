"""How a gate, mean activations or embeddings were made: stored beside them as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from phatgoose import __version__

FORMAT = 1
# what all kinds share closes the JSON object, after what one kind has alone
_LAST = ("settings", "phatgoose", "format")


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """What every file records.

    Attributes:
        phatgoose: version of phatgoose that wrote the file.
        format: version of the file format.
    """

    phatgoose: str = __version__
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """Plain data, in the order in which it is written."""
        values = asdict(self)
        shared = {name: values.pop(name) for name in _LAST if name in values}
        return values | shared


@dataclass(frozen=True, kw_only=True)
class VectorProvenance(Provenance):
    """Provenance of vectors that a base model and an adapter produced.

    Attributes:
        base: name of the base model.
        revision: revision of the base model; None if not pinned.
        data: fingerprint of the examples (`phatgoose.data.examples.fingerprint`); None if unknown.
        adapter_sha256: sha256 of the adapter_model.safetensors that the vectors belong to.
        settings: every setting of the computation.
    """

    base: str
    revision: str | None
    data: str | None
    adapter_sha256: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class GateProvenance(VectorProvenance):
    """Provenance of a gate; the content of gate_config.json.

    `settings` holds `TextConfig`, and `GateConfig` or, if the gate was trained
    together with its adapter, `AdapterTrainingConfig`.

    Attributes:
        steps: optimiser steps.
        learning_rate: peak learning rate.
        seed: random seed of the training.
    """

    steps: int
    learning_rate: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class ActivationsProvenance(VectorProvenance):
    """Provenance of mean activations; the content of activations_config.json.

    `settings` holds the random seed of the sample and `TextConfig`.

    Attributes:
        num_examples: number of examples averaged over.
    """

    num_examples: int


@dataclass(frozen=True, kw_only=True)
class EmbeddingsProvenance(Provenance):
    """Provenance of embeddings; stored in the metadata of their file.

    Attributes:
        encoder: name of the sentence encoder.
        data: fingerprint of the examples (`phatgoose.data.examples.fingerprint`).
        num_examples: number of embedded examples.
        seed: random seed of the sample.
    """

    encoder: str
    data: str
    num_examples: int
    seed: int
