"""Answers against a plain loop over single prompts and single tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.data import as_text, token_ids
from helpers.models import EOS, MODELS, make_tokenizer
from helpers.pools import make_pool
from phatgoose.config import GenerationConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.inference.generation import answer, answers
from phatgoose.routing.model import RoutedModel

LENGTH = 10
PROMPTS = [as_text(token_ids(1 + i % 7, seed=i).tolist()) for i in range(24)]


FREQUENT = {"llama": 58, "gpt2": 11, "t5": 56}  # a token that the model likes to write


def make_model(kind: str) -> Any:
    """Ends some answers early, so that batches hold finished ones: EOS comes where a frequent token would."""
    model = MODELS[kind]()
    with torch.no_grad():
        weight = model.get_output_embeddings().weight
        weight[EOS] = 1.1 * weight[FREQUENT[kind]]
    return model


def make_encoder(model: Any) -> Encoder:
    return Encoder(make_tokenizer(), model.config, TextConfig(separator=" <3> "))


@torch.no_grad()
def plain_answer(model: Any, coder: Encoder, text: str) -> list[int]:
    """The likeliest token again and again, each from a pass over everything before it."""
    prompt_ids, answer_ids = coder.prompt(text), []
    while len(answer_ids) < LENGTH and EOS not in answer_ids:
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": [prompt_ids], "decoder_input_ids": [[0, *answer_ids]]}
        else:
            inputs = {"input_ids": [[*prompt_ids, *answer_ids]]}
        logits_V = model(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits[0, -1]
        answer_ids.append(int(logits_V.argmax()))
    return answer_ids


@pytest.mark.parametrize("kind", ["llama", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("is_routed", [False, True])
def test_batched_answers_are_the_plain_loop(kind: str, is_routed: bool, tmp_path: Path) -> None:
    model = make_model(kind)
    if is_routed:
        model = RoutedModel.from_pool(model, make_pool(MODELS[kind], tmp_path))
    coder, config = make_encoder(model), GenerationConfig(max_new_tokens=LENGTH)
    expected = [plain_answer(model, coder, text) for text in PROMPTS]
    lengths = {len(ids) for ids in expected}
    assert LENGTH in lengths and len(lengths) > 1  # some end early, some do not
    for batch_tokens in (1, 60, 10_000):
        found = answers(model, coder, PROMPTS, config, batch_tokens=batch_tokens)
        assert [one.answer_ids for one in found] == expected
        assert [one.prompt_ids for one in found] == [coder.prompt(text) for text in PROMPTS]
    assert answer(model, coder, PROMPTS[3], config) == found[3]
    assert found[3].text == as_text(i for i in expected[3] if i > EOS)


def test_every_batch_is_told_of() -> None:
    model = make_model("llama")
    counts: list[int] = []
    config = GenerationConfig(max_new_tokens=3)
    answers(model, make_encoder(model), PROMPTS, config, batch_tokens=40, on_batch=counts.append)
    assert sum(counts) == len(PROMPTS) and 1 < len(counts) < len(PROMPTS)
    assert answers(model, make_encoder(model), [], config) == []


def test_drawn_answers_do_not_depend_on_their_neighbours() -> None:
    model = make_model("llama")
    coder, config = make_encoder(model), GenerationConfig(max_new_tokens=LENGTH, sample=True, seed=3)
    found = answers(model, coder, PROMPTS[:6], config)
    assert found == [answer(model, coder, text, config) for text in PROMPTS[:6]]
    assert found != answers(model, coder, PROMPTS[:6], GenerationConfig(max_new_tokens=LENGTH))


def test_beams_do_not_depend_on_the_batch() -> None:
    model = make_model("llama")
    coder, config = make_encoder(model), GenerationConfig(max_new_tokens=LENGTH, num_beams=3)
    found = answers(model, coder, PROMPTS, config)
    assert found == [answer(model, coder, text, config) for text in PROMPTS]
    assert found != answers(model, coder, PROMPTS, GenerationConfig(max_new_tokens=LENGTH))
