"""Embedding an expert's examples, for Retrieval and GLIDER (paper section 4.2)."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from phatgoose import __version__
from phatgoose.data import Example, fingerprint
from phatgoose.embeddings import EmbeddingsProvenance, save_embeddings
from phatgoose.expert import Expert
from phatgoose.sentence_encoder import SentenceEncoder

NUM_EXAMPLES = 1000


def save_example_embeddings(
    expert: Expert,
    examples: Sequence[Example],
    *,
    num_examples: int = NUM_EXAMPLES,
    seed: int = 0,
    encoder: SentenceEncoder | None = None,
) -> torch.Tensor:
    """Embed the inputs of an expert's examples and write them into its folder.

    Args:
        expert: its folder gets embeddings.safetensors.
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
    save_embeddings(expert.folder, embeddings_MD, provenance)
    return embeddings_MD
