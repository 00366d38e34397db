"""Generation: a model's answers to prompts, alone or in batches, and the routing of an answer.

Axes: B sequences, S positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import set_seed

from phatgoose.config import GenerationConfig
from phatgoose.data.batching import by_length
from phatgoose.data.encoder import Encoder, pad
from phatgoose.inference.scoring import routed_prompts
from phatgoose.routing.model import RoutedModel
from phatgoose.routing.trace import Trace


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A model's answer to a prompt.

    Attributes:
        prompt_ids: token ids of the prompt as the model reads it.
        answer_ids: token ids of the answer, including EOS if the model ended it.
        text: the answer as text, without special tokens and surrounding white space.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    text: str


def answer(model: Any, encoder: Encoder, text: str, config: GenerationConfig) -> Answer:
    """Generate an answer to one prompt; see `answers`."""
    set_seed(config.seed)
    return _generate(model, encoder, [encoder.prompt(text)], config)[0]


def answers(
    model: Any,
    encoder: Encoder,
    texts: Sequence[str],
    config: GenerationConfig,
    *,
    batch_tokens: int = 4096,
    on_batch: Callable[[int], object] | None = None,
    without: Sequence[Sequence[str]] = (),
) -> list[Answer]:
    """Generate answers to many prompts, in batches of prompts of similar length.

    Which prompts share a batch changes answers by rounding only. Sampled answers
    (`config.sample`) would depend on the batch, so each is generated alone, with the
    same seed.

    Args:
        model: a transformers model or a RoutedModel.
        encoder: the base model's encoder.
        texts: the prompts.
        config: length, beams and sampling of every answer.
        batch_tokens: most positions of a batch with complete answers, padding and beams
            included; a batch has at least one prompt.
        on_batch: called after each batch with its number of prompts.
        without: names of the experts to mask, for each text (see `RoutedModel.prompts`); empty to mask none.

    Returns:
        One answer for each text, in the order of `texts`.
    """
    prompts = encoder.prompts(texts)
    lengths = [len(prompt) + config.max_new_tokens for prompt in prompts]
    beams = [config.num_beams] * len(prompts)
    answer_of: dict[int, Answer] = {}
    for indices in by_length(
        lengths, num_sequences=beams, max_positions=batch_tokens, max_items=1 if config.sample else None
    ):
        set_seed(config.seed)
        masked = [without[i] for i in indices] if without else ()
        written = _generate(model, encoder, [prompts[i] for i in indices], config, masked)
        answer_of.update(zip(indices, written, strict=True))
        if on_batch is not None:
            on_batch(len(indices))
    return [answer_of[i] for i in range(len(prompts))]


def _generate(
    model: Any,
    encoder: Encoder,
    prompts: list[list[int]],
    config: GenerationConfig,
    without: Sequence[Sequence[str]] = (),
) -> list[Answer]:
    # A decoder-only model continues from the last position, which must not be padding
    left = not encoder.encoder_decoder
    input_ids_BS = pad(prompts, encoder.pad_id, left=left).to(model.device)
    with routed_prompts(model, prompts, without):
        output_ids_BS = model.generate(
            input_ids=input_ids_BS,
            attention_mask=pad([[1] * len(prompt) for prompt in prompts], 0, left=left).to(model.device),
            max_new_tokens=config.max_new_tokens,
            num_beams=config.num_beams,
            do_sample=config.sample,
            eos_token_id=encoder.eos_id,
            pad_token_id=encoder.pad_id,
        )
    # An encoder-decoder model's output begins with its start token, a decoder-only model's with the prompt
    begin = 1 if encoder.encoder_decoder else input_ids_BS.shape[1]
    written = []
    for prompt_ids, output_ids in zip(prompts, output_ids_BS.tolist(), strict=True):
        answer_ids = output_ids[begin:]
        if encoder.eos_id in answer_ids:  # what follows is padding
            answer_ids = answer_ids[: answer_ids.index(encoder.eos_id) + 1]
        written.append(Answer(prompt_ids=prompt_ids, answer_ids=answer_ids, text=encoder.decode(answer_ids).strip()))
    return written


def traced_answer(model: RoutedModel, encoder: Encoder, text: str, config: GenerationConfig) -> tuple[Answer, Trace]:
    """`answer` with the routing of every token that the model reads: all but the last one of the answer."""
    with model.trace() as trace:
        written = answer(model, encoder, text, config)
    return written, trace
