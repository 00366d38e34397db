"""A model's loss and accuracy on a dataset, for the demo's recipes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.evaluation.suites.metrics import rank_classification
from phatgoose.inference.scoring import target_losses


@dataclass(frozen=True, kw_only=True)
class Score:
    """A model's score on one dataset.

    Attributes:
        loss: mean cross-entropy per target token (nats).
        accuracy: accuracy of rank classification; None if no example has choices.
        num_examples: number of examples behind `loss`.
        num_choices: number of examples behind `accuracy`.
    """

    loss: float
    accuracy: float | None
    num_examples: int
    num_choices: int


def score(model: Any, encoder: Encoder, examples: Sequence[Example], *, batch_tokens: int) -> Score:
    """Loss over all examples, and accuracy of rank classification over those with choices.

    Args:
        model: a transformers model or a RoutedModel.
        encoder: the base model's encoder.
        examples: at least one.
        batch_tokens: positions of a batch, padding included.
    """
    texts = [(one.input, answer) for one in examples for answer in (one.target, *(one.choices or ()))]
    prompts = encoder.prompts([prompt for prompt, _ in texts])
    targets = encoder.targets([answer for _, answer in texts])
    sums = target_losses(model, encoder, list(zip(prompts, targets, strict=True)), batch_tokens=batch_tokens)
    losses = iter(zip(sums, map(len, targets), strict=True))
    loss, tokens, right = 0.0, 0, []
    for example in examples:
        target_loss, num_tokens = next(losses)
        loss, tokens = loss + target_loss, tokens + num_tokens
        means = [total / length for _, (total, length) in zip(example.choices or (), losses, strict=False)]
        if example.choices:
            right.append(rank_classification(example.choices, means, [example.target]))
    return Score(
        loss=loss / tokens,
        accuracy=sum(right) / len(right) if right else None,
        num_examples=len(examples),
        num_choices=len(right),
    )
