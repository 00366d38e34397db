"""Texts through a model: its answers, token by token, and the routing.

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
    """What a model made of a prompt.

    Attributes:
        prompt_ids: as the model read them.
        answer_ids: as it wrote them, up to and with EOS if it came.
        text: the answer, without special tokens.
    """

    prompt_ids: list[int]
    answer_ids: list[int]
    text: str


def answer(model: Any, encoder: Encoder, text: str, config: GenerationConfig) -> Answer:
    """Generate an answer to one prompt with a model of transformers or a RoutedModel."""
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
    """Generate answers to many prompts, in batches of prompts of like length.

    Which prompts share a batch changes nothing but rounding. Drawn answers
    (`config.sample`) would depend on it, so they are made one by one, each with
    the same seed.

    Args:
        model: a model of transformers, or a RoutedModel.
        encoder: of the base model.
        texts: the prompts.
        config: of every answer.
        batch_tokens: positions of a batch when its answers are complete,
            padding and beams included; one prompt at least.
        on_batch: called with the number of prompts of each finished batch.
        without: for each text, the experts that are masked for it (`RoutedModel.prompts`); nothing for none.

    Returns:
        One answer a text, in the order of `texts`.
    """
    prompts = encoder.prompts(texts)
    lengths = [len(prompt) + config.max_new_tokens for prompt in prompts]
    beams = [config.num_beams] * len(prompts)
    by_number: dict[int, Answer] = {}
    for numbers in by_length(
        lengths, num_sequences=beams, max_positions=batch_tokens, max_items=1 if config.sample else None
    ):
        set_seed(config.seed)
        masked = [without[i] for i in numbers] if without else ()
        written = _generate(model, encoder, [prompts[i] for i in numbers], config, masked)
        by_number.update(zip(numbers, written, strict=True))
        if on_batch is not None:
            on_batch(len(numbers))
    return [by_number[i] for i in range(len(prompts))]


def _generate(
    model: Any,
    encoder: Encoder,
    prompts: list[list[int]],
    config: GenerationConfig,
    without: Sequence[Sequence[str]] = (),
) -> list[Answer]:
    # a decoder-only model goes on from the last position, which must be the prompt's own
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
    # an encoder-decoder model's output begins with its start token, a decoder-only model's with the prompt
    begin = 1 if encoder.encoder_decoder else input_ids_BS.shape[1]
    written = []
    for prompt_ids, output_ids in zip(prompts, output_ids_BS.tolist(), strict=True):
        answer_ids = output_ids[begin:]
        if encoder.eos_id in answer_ids:  # what follows is padding
            answer_ids = answer_ids[: answer_ids.index(encoder.eos_id) + 1]
        written.append(Answer(prompt_ids=prompt_ids, answer_ids=answer_ids, text=encoder.decode(answer_ids).strip()))
    return written


def traced_answer(model: RoutedModel, encoder: Encoder, text: str, config: GenerationConfig) -> tuple[Answer, Trace]:
    """`answer`, and the routing of every token that the model read (all but the last that it wrote)."""
    with model.trace() as trace:
        written = answer(model, encoder, text, config)
    return written, trace
