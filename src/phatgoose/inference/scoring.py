"""Scores of a model on examples: loss on the targets, and rank classification.

Axes: U prompts, C targets a prompt, B = U * C sequences, P positions of a
prompt, T positions of a target, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.data.encoder import IGNORED, Encoder, pad
from phatgoose.data.examples import Example
from phatgoose.routing.model import RoutedModel

Pair = tuple[list[int], list[int]]
OnBatch = Callable[[int], object]


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


class TargetScore(NamedTuple):
    """One target after its prompt.

    Attributes:
        loss: summed cross-entropy (nats).
        greedy: whether each of its tokens is the model's first choice.
    """

    loss: float
    greedy: bool


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
    asked = [(one.input, answer) for one in examples for answer in (one.target, *(one.choices or ()))]
    prompts = encoder.prompts([text for text, _ in asked])
    pairs: list[Pair] = list(zip(prompts, encoder.targets([answer for _, answer in asked]), strict=True))
    with tqdm(total=len(pairs), desc=progress, disable=progress is None, leave=False) as bar:
        sums = target_losses(model, encoder, pairs, batch_tokens=batch_tokens, on_batch=bar.update)

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


def target_losses(model: Any, encoder: Encoder, pairs: Sequence[Pair], **options: Any) -> list[float]:
    """Summed cross-entropy (nats) of each target after its prompt; see `target_scores` for the options."""
    scores = target_scores(model, encoder, pairs, **options)
    return [score.loss for score in scores]


@torch.no_grad()
def target_scores(
    model: Any,
    encoder: Encoder,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 4096,
    on_batch: OnBatch | None = None,
    without: Sequence[Sequence[str]] = (),
) -> list[TargetScore]:
    """Score each target after its prompt.

    Targets of one prompt share one pass over it. Batches are of like length;
    which pairs share one changes nothing but rounding.

    Args:
        model: a model of transformers, or a RoutedModel.
        encoder: of the base model.
        pairs: (prompt ids, target ids), neither empty.
        batch_tokens: positions of a batch, padding included; one pair at least.
        on_batch: called with the number of pairs of each finished batch.
        without: for each pair, the experts that are masked for it (`RoutedModel.prompts`); nothing for none.

    Returns:
        One score a pair, in the order of `pairs`.
    """
    scores: dict[int, TargetScore] = {}
    for batch in _batches(pairs, batch_tokens, without):
        prompts = [pairs[indices[0]][0] for indices in batch]
        targets = [pairs[i][1] for indices in batch for i in indices]
        labels_BT = pad(targets, IGNORED).to(model.device)
        masked = [without[indices[0]] for indices in batch] if without else ()
        with routed_prompts(model, prompts, masked):
            logits = _encoder_decoder_logits if encoder.encoder_decoder else _decoder_logits
            logits_BTV = logits(model, encoder, prompts, targets)
        counts_BT = labels_BT != IGNORED
        losses_BT = torch.zeros(labels_BT.shape, device=labels_BT.device)
        losses_BT[counts_BT] = F.cross_entropy(logits_BTV[counts_BT].float(), labels_BT[counts_BT], reduction="none")
        greedy_B = ((logits_BTV.argmax(dim=-1) == labels_BT) | ~counts_BT).all(dim=1)
        found = map(TargetScore, losses_BT.sum(dim=1).tolist(), greedy_B.tolist())
        scores.update(zip((i for indices in batch for i in indices), found, strict=True))
        if on_batch is not None:
            on_batch(len(targets))
    return [scores[i] for i in range(len(pairs))]


def routed_prompts(
    model: Any, prompts: Sequence[Sequence[int]], without: Sequence[Sequence[str]] = ()
) -> AbstractContextManager[None]:
    """`RoutedModel.prompts`, which a model without experts does not have."""
    return model.prompts(prompts, without) if isinstance(model, RoutedModel) else nullcontext()


def _batches(
    pairs: Sequence[Pair], batch_tokens: int, without: Sequence[Sequence[str]] = ()
) -> Iterator[list[list[int]]]:
    """Batches of prompts, each prompt as the numbers of its pairs: as many for every prompt of a batch."""
    groups = sorted(_groups(pairs, batch_tokens, without), key=lambda group: (-len(group), -_length(pairs, group)))
    batch: list[list[int]] = []
    for group in groups:
        num_targets = len(group)
        positions = (len(batch) + 1) * num_targets * _length(pairs, batch[0] if batch else group)
        if batch and (num_targets != len(batch[0]) or positions > batch_tokens):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


def _groups(pairs: Sequence[Pair], batch_tokens: int, without: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Numbers of the pairs of each prompt (and mask), in parts that fit a batch."""
    by_prompt: dict[tuple[Any, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(pairs):
        by_prompt.setdefault((tuple(prompt), tuple(without[i]) if without else ()), []).append(i)
    for indices in by_prompt.values():
        fitting = max(1, batch_tokens // _length(pairs, indices))
        yield from (indices[start : start + fitting] for start in range(0, len(indices), fitting))


def _length(pairs: Sequence[Pair], group: Sequence[int]) -> int:
    return len(pairs[group[0]][0]) + max(len(pairs[i][1]) for i in group)


def _decoder_logits(
    model: Any, encoder: Encoder, prompts: Sequence[list[int]], targets: Sequence[list[int]]
) -> torch.Tensor:
    """logits_BTV of a decoder-only model: one call for the prompts, one for the targets with the prompts' cache."""
    num_targets = len(targets) // len(prompts)
    prompt_UP = pad(prompts, encoder.pad_id, left=True).to(model.device)
    mask_UP = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(model.device)
    position_UP = (mask_UP.cumsum(dim=1) - 1).clamp(min=0)
    accepted = signature((model.model if isinstance(model, RoutedModel) else model).forward).parameters
    options = {"position_ids": position_UP, "logits_to_keep": 1}
    options = {name: value for name, value in options.items() if name in accepted}
    output = model(input_ids=prompt_UP, attention_mask=mask_UP, use_cache=True, **options)
    first_B1V = output.logits[:, -1:].repeat_interleave(num_targets, dim=0)
    # EOS, which ends every target, is never read
    read = [target[:-1] for target in targets]
    if not any(read):
        return first_B1V
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_targets)
    target_BT = pad(read, encoder.pad_id).to(model.device)
    mask_BT = pad([[1] * len(ids) for ids in read], 0).to(model.device)
    lengths_B1 = mask_UP.sum(dim=1, keepdim=True).repeat_interleave(num_targets, dim=0)
    options = {"position_ids": lengths_B1 + torch.arange(target_BT.shape[1], device=model.device)}
    options = {name: value for name, value in options.items() if name in accepted}
    rest_BTV = model(
        input_ids=target_BT,
        attention_mask=torch.cat([mask_UP.repeat_interleave(num_targets, dim=0), mask_BT], dim=1),
        past_key_values=cache,
        use_cache=True,
        **options,
    ).logits
    return torch.cat([first_B1V, rest_BTV], dim=1)


def _encoder_decoder_logits(
    model: Any, encoder: Encoder, prompts: Sequence[list[int]], targets: Sequence[list[int]]
) -> torch.Tensor:
    """logits_BTV of an encoder-decoder model: the encoder reads each prompt once."""
    num_targets = len(targets) // len(prompts)
    prompt_UP = pad(prompts, encoder.pad_id).to(model.device)
    mask_UP = pad([[1] * len(prompt) for prompt in prompts], 0).to(model.device)
    encoded_UPD = model.get_encoder()(input_ids=prompt_UP, attention_mask=mask_UP).last_hidden_state
    logits_BTV: torch.Tensor = model(
        encoder_outputs=BaseModelOutput(last_hidden_state=encoded_UPD.repeat_interleave(num_targets, dim=0)),
        attention_mask=mask_UP.repeat_interleave(num_targets, dim=0),
        decoder_input_ids=pad([[encoder.start_id, *ids[:-1]] for ids in targets], encoder.pad_id).to(model.device),
        use_cache=False,
    ).logits
    return logits_BTV
