"""Scores of a model on examples: loss on the targets, and rank classification.

Axes: B sequences, S positions, V vocabulary, M target tokens of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm

from phatgoose.data import IGNORED, Encoder, Example


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model on one dataset.

    Attributes:
        loss: mean cross-entropy per target token (nats).
        accuracy: of rank classification; None if no example has choices.
        num_examples: that `loss` is over.
        num_choices: examples that `accuracy` is over.
    """

    loss: float
    accuracy: float | None
    num_examples: int
    num_choices: int


def score(
    model: Any, encoder: Encoder, examples: Sequence[Example], *, batch_tokens: int = 4096, progress: str | None = None
) -> Score:
    """Loss over all examples, and accuracy over those with choices.

    Rank classification (paper section 4.1): the choice with the lowest mean
    loss per token, EOS included, is the answer.

    Args:
        model: a model of transformers, or a RoutedModel.
        encoder: of the base model.
        examples: at least one.
        batch_tokens: positions of a batch, padding included.
        progress: label of a progress bar; None for none.
    """
    pairs: list[tuple[list[int], list[int]]] = []
    for example in examples:
        prompt = encoder.prompt(example.input)
        answers = [example.target, *(example.choices or ())]
        pairs.extend((prompt, encoder.target(answer)) for answer in answers)
    sums = target_losses(model, encoder, pairs, batch_tokens=batch_tokens, progress=progress)

    loss, tokens, right, with_choices, at = 0.0, 0, 0, 0, 0
    for example in examples:
        loss += sums[at]
        tokens += len(pairs[at][1])
        choices = example.choices or ()
        means = [sums[at + 1 + c] / len(pairs[at + 1 + c][1]) for c in range(len(choices))]
        if choices:
            with_choices += 1
            right += choices[means.index(min(means))] == example.target
        at += 1 + len(choices)
    return Score(
        loss=loss / tokens,
        accuracy=right / with_choices if with_choices else None,
        num_examples=len(examples),
        num_choices=with_choices,
    )


@torch.no_grad()
def target_losses(
    model: Any,
    encoder: Encoder,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_tokens: int = 4096,
    progress: str | None = None,
) -> list[float]:
    """Summed cross-entropy (nats) of each target after its prompt.

    Args:
        pairs: (prompt ids, target ids); batches are made of pairs of like length.

    Returns:
        One number a pair, in the order of `pairs`.
    """
    rows = [encoder.row(prompt, target) for prompt, target in pairs]
    lengths = [max(len(row["input_ids"]), len(row["labels"])) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    losses = [0.0] * len(rows)
    with tqdm(total=len(rows), desc=progress, disable=progress is None, leave=False) as bar:
        start = 0
        while start < len(order):
            batch_ids = order[start : start + max(1, batch_tokens // lengths[order[start]])]
            batch = {k: v.to(model.device) for k, v in encoder.collate([rows[i] for i in batch_ids]).items()}
            labels_BS = batch.pop("labels")
            logits_BSV = model(**batch).logits
            counts_BS = labels_BS != IGNORED
            losses_BS = torch.zeros(labels_BS.shape, device=labels_BS.device)
            logits_MV = logits_BSV[counts_BS].float()
            losses_BS[counts_BS] = F.cross_entropy(logits_MV, labels_BS[counts_BS], reduction="none")
            for i, loss in zip(batch_ids, losses_BS.sum(1).tolist(), strict=True):
                losses[i] = loss
            start += len(batch_ids)
            bar.update(len(batch_ids))
    return losses
