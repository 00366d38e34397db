"""One text through a model: its answer, token by token, and the routing.

Axes: S positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from phatgoose.config import GenerationConfig
from phatgoose.data import Encoder
from phatgoose.routed import RoutedModel
from phatgoose.trace import Trace


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
    prompt_ids = encoder.prompt(text)
    input_ids_1S = torch.tensor([prompt_ids], device=model.device)
    output_ids = model.generate(
        input_ids=input_ids_1S,
        attention_mask=torch.ones_like(input_ids_1S),
        max_new_tokens=config.max_new_tokens,
        num_beams=config.num_beams,
        do_sample=config.sample,
        eos_token_id=encoder.eos_id,
        pad_token_id=encoder.pad_id,
    )[0].tolist()
    # an encoder-decoder model's output begins with its start token, a decoder-only model's with the prompt
    answer_ids = output_ids[1:] if encoder.encoder_decoder else output_ids[len(prompt_ids) :]
    if encoder.eos_id in answer_ids:  # what follows is padding
        answer_ids = answer_ids[: answer_ids.index(encoder.eos_id) + 1]
    return Answer(
        prompt_ids=prompt_ids,
        answer_ids=answer_ids,
        text=encoder.decode(answer_ids).strip(),
    )


def traced_answer(model: RoutedModel, encoder: Encoder, text: str, config: GenerationConfig) -> tuple[Answer, Trace]:
    """`answer`, and the routing of every token that the model read (all but the last that it wrote)."""
    with model.trace() as trace:
        found = answer(model, encoder, text, config)
    return found, trace
