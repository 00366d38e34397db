"""Loss of targets after their prompts, under a base or a routed model.

Pairs of one prompt share one pass over it: `target_scores` groups them, makes
batches of similar length, and computes each batch's logits in one of two ways.

Axes: U prompts, C targets of each prompt, B = U * C sequences, P positions of a
prompt, T positions of a target, D features of the encoder, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutput

from phatgoose.data.batching import by_length
from phatgoose.data.encoder import IGNORED, Encoder, pad
from phatgoose.routing.model import RoutedModel

Pair = tuple[list[int], list[int]]


class TargetScore(NamedTuple):
    """Score of one target after its prompt.

    Attributes:
        loss: cross-entropy in nats, summed over the target's tokens.
        greedy: whether every token is the model's most likely one.
    """

    loss: float
    greedy: bool


def target_losses(model: Any, encoder: Encoder, pairs: Sequence[Pair], **options: Any) -> list[float]:
    """Loss of each target after its prompt: `target_scores`, which takes the same options, without `greedy`."""
    return [score.loss for score in target_scores(model, encoder, pairs, **options)]


@torch.no_grad()
def target_scores(
    model: Any,
    encoder: Encoder,
    pairs: Sequence[Pair],
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int], object] | None = None,
    without: Sequence[Sequence[str]] = (),
) -> list[TargetScore]:
    """Score each target after its prompt.

    Which pairs share a batch changes scores by rounding only.

    Args:
        model: a transformers model or a RoutedModel.
        encoder: the base model's encoder.
        pairs: (prompt ids, target ids), neither empty.
        batch_tokens: most positions of a batch, padding included; a batch has at least one pair.
        on_batch: called after each batch with its number of pairs.
        without: names of the experts to mask, for each pair (see `RoutedModel.prompts`); empty to mask none.

    Returns:
        One score for each pair, in the order of `pairs`.
    """
    scores: dict[int, TargetScore] = {}
    for batch in _batches(pairs, batch_tokens, without):
        prompts = [pairs[indices[0]][0] for indices in batch]
        targets = [pairs[i][1] for indices in batch for i in indices]
        masked = [without[indices[0]] for indices in batch] if without else ()
        with routed_prompts(model, prompts, masked):
            logits = _encoder_decoder_logits if encoder.encoder_decoder else _decoder_logits
            logits_BTV = logits(model, encoder, prompts, targets)
        scores.update(zip((i for indices in batch for i in indices), _scores(logits_BTV, targets), strict=True))
        if on_batch is not None:
            on_batch(len(targets))
    return [scores[i] for i in range(len(pairs))]


def routed_prompts(
    model: Any, prompts: Sequence[Sequence[int]], without: Sequence[Sequence[str]] = ()
) -> AbstractContextManager[None]:
    """`model.prompts(prompts, without)` for a RoutedModel; for a plain model, nothing."""
    return model.prompts(prompts, without) if isinstance(model, RoutedModel) else nullcontext()


def _batches(pairs: Sequence[Pair], batch_tokens: int, without: Sequence[Sequence[str]]) -> Iterator[list[list[int]]]:
    """Batches of prompts; each prompt is the list of its pairs' indices, equally long within a batch."""
    groups = list(_groups(pairs, batch_tokens, without))
    lengths = [_length(pairs, indices) for indices in groups]
    for batch in by_length(lengths, num_sequences=[len(indices) for indices in groups], max_positions=batch_tokens):
        yield [groups[i] for i in batch]


def _groups(pairs: Sequence[Pair], batch_tokens: int, without: Sequence[Sequence[str]]) -> Iterator[list[int]]:
    """Indices of the pairs that share a prompt (and masked experts), split where they would not fit one batch."""
    by_prompt: dict[tuple[Any, ...], list[int]] = {}
    for i, (prompt, _) in enumerate(pairs):
        by_prompt.setdefault((tuple(prompt), tuple(without[i]) if without else ()), []).append(i)
    for indices in by_prompt.values():
        fitting = max(1, batch_tokens // _length(pairs, indices))
        yield from (indices[start : start + fitting] for start in range(0, len(indices), fitting))


def _length(pairs: Sequence[Pair], indices: Sequence[int]) -> int:
    """Positions of the longest of the pairs of one prompt."""
    return len(pairs[indices[0]][0]) + max(len(pairs[i][1]) for i in indices)


def _scores(logits_BTV: torch.Tensor, targets: Sequence[list[int]]) -> Iterator[TargetScore]:
    """Score of each target, given the logits that predict its tokens."""
    labels_BT = pad(targets, IGNORED).to(logits_BTV.device)
    counts_BT = labels_BT != IGNORED
    losses_BT = torch.zeros(labels_BT.shape, device=labels_BT.device)
    losses_BT[counts_BT] = F.cross_entropy(logits_BTV[counts_BT].float(), labels_BT[counts_BT], reduction="none")
    greedy_B = ((logits_BTV.argmax(dim=-1) == labels_BT) | ~counts_BT).all(dim=1)
    return map(TargetScore, losses_BT.sum(dim=1).tolist(), greedy_B.tolist())


def _decoder_logits(
    model: Any, encoder: Encoder, prompts: Sequence[list[int]], targets: Sequence[list[int]]
) -> torch.Tensor:
    """logits_BTV of a decoder-only model: one call for the prompts, one for the targets on the prompts' cache."""
    num_targets = len(targets) // len(prompts)
    prompt_UP = pad(prompts, encoder.pad_id, left=True).to(model.device)
    mask_UP = pad([[1] * len(prompt) for prompt in prompts], 0, left=True).to(model.device)
    position_UP = (mask_UP.cumsum(dim=1) - 1).clamp(min=0)
    options = _accepted(model, position_ids=position_UP, logits_to_keep=1)
    output = model(input_ids=prompt_UP, attention_mask=mask_UP, use_cache=True, **options)
    first_B1V = output.logits[:, -1:].repeat_interleave(num_targets, dim=0)
    # EOS ends every target and is never read
    read = [target[:-1] for target in targets]
    if not any(read):
        return first_B1V
    cache = output.past_key_values
    cache.batch_repeat_interleave(num_targets)
    target_BT = pad(read, encoder.pad_id).to(model.device)
    mask_BT = pad([[1] * len(ids) for ids in read], 0).to(model.device)
    lengths_B1 = mask_UP.sum(dim=1, keepdim=True).repeat_interleave(num_targets, dim=0)
    rest_BTV = model(
        input_ids=target_BT,
        attention_mask=torch.cat([mask_UP.repeat_interleave(num_targets, dim=0), mask_BT], dim=1),
        past_key_values=cache,
        use_cache=True,
        **_accepted(model, position_ids=lengths_B1 + torch.arange(target_BT.shape[1], device=model.device)),
    ).logits
    return torch.cat([first_B1V, rest_BTV], dim=1)


def _accepted(model: Any, **options: Any) -> dict[str, Any]:
    """Those options that the forward of the (wrapped) model has."""
    forward = (model.model if isinstance(model, RoutedModel) else model).forward
    return {name: value for name, value in options.items() if name in signature(forward).parameters}


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
