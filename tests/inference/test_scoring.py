"""Scores against a plain loop over single requests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.data import as_text, token_ids
from helpers.models import MODELS, make_tokenizer
from helpers.pools import make_pool
from phatgoose.config import GenerationConfig, TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.evaluation.suites.metrics import rank_classification
from phatgoose.inference.generation import answers
from phatgoose.inference.scoring import target_losses, target_scores
from phatgoose.routing.model import RoutedModel

KINDS = ["llama", "t5"]


def text(length: int, seed: int) -> str:
    return as_text(token_ids(length, seed=seed).tolist())


def examples() -> list[Example]:
    """Some with choices, of unlike lengths; some without; one with an empty target."""
    rows = []
    for i in range(12):
        choices = tuple(text(1 + (i + c) % 4, 100 * i + c) for c in range(3))
        rows.append(Example(input=text(1 + 3 * (i % 5), i), target=choices[i % 3], choices=choices))
    rows += [Example(input=text(4, 50 + i), target=text(6, 60 + i)) for i in range(3)]
    return [*rows, Example(input=text(4, 70), target="")]


def encoder(model: Any) -> Encoder:
    return Encoder(make_tokenizer(), model.config, TextConfig(separator=" <3> "))


@torch.no_grad()
def plain_loss(model: Any, coder: Encoder, prompt: str, answer: str) -> tuple[float, int]:
    """Summed loss and count of the answer's tokens: one request, one token at a time."""
    prompt_ids, answer_ids = coder.prompt(prompt), coder.target(answer)
    total = 0.0
    for t, token in enumerate(answer_ids):
        if model.config.is_encoder_decoder:
            inputs = {"input_ids": [prompt_ids], "decoder_input_ids": [[0, *answer_ids[:t]]]}
        else:
            inputs = {"input_ids": [[*prompt_ids, *answer_ids[:t]]]}
        logits_V = model(**{name: torch.tensor(ids) for name, ids in inputs.items()}).logits[0, -1]
        total -= logits_V.double().log_softmax(0)[token].item()
    return total, len(answer_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_routed", [False, True])
def test_losses_are_those_of_the_plain_loop(kind: str, is_routed: bool, tmp_path: Path) -> None:
    model = MODELS[kind]()
    if is_routed:
        model = RoutedModel.from_pool(model, make_pool(MODELS[kind], tmp_path))
    coder = encoder(model)
    texts = [(one.input, target) for one in examples() for target in (one.target, *(one.choices or ()))]
    plain = [plain_loss(model, coder, *pair) for pair in texts]
    pairs = [(coder.prompt(prompt), coder.target(target)) for prompt, target in texts]
    losses = target_losses(model, coder, pairs)
    assert losses == pytest.approx([loss for loss, _ in plain], rel=1e-5)

    right, at = [], 0
    for example in examples():
        own = slice(at + 1, at + 1 + len(example.choices or ()))
        if example.choices:
            means = [loss / count for loss, count in plain[own]]
            right.append(example.choices[means.index(min(means))] == example.target)
            means = [loss / len(target) for loss, (_, target) in zip(losses[own], pairs[own], strict=True)]
            assert rank_classification(example.choices, means, [example.target]) == right[-1]
        at = own.stop
    assert at == len(pairs) and len(right) == 12
    assert 0 < sum(right) < len(right)  # else the choices say nothing


@pytest.mark.parametrize("kind", KINDS)
def test_batches_do_not_matter(kind: str) -> None:
    model = MODELS[kind]()
    coder = encoder(model)
    pairs = [(coder.prompt(example.input), coder.target(example.target)) for example in examples()]
    alone = target_losses(model, coder, pairs, batch_tokens=1)
    for batch_tokens in (30, 100, 10_000):
        assert target_losses(model, coder, pairs, batch_tokens=batch_tokens) == pytest.approx(alone, rel=1e-5)
    assert target_losses(model, coder, pairs[::-1]) == pytest.approx(alone[::-1], rel=1e-5)


@pytest.mark.parametrize("kind", MODELS)
def test_targets_of_one_prompt_share_a_pass(kind: str) -> None:
    """Many targets of one prompt, none a second one, prompts with other counts: all as if alone."""
    model = MODELS[kind]()
    coder = encoder(model)
    prompts = [coder.prompt(text(1 + 4 * i, i)) for i in range(4)]
    counts = [1, 5, 5, 2]
    pairs = [
        (prompt, coder.target(text(c % 4, 10 * i + c) if c else ""))
        for i, prompt in enumerate(prompts)
        for c in range(counts[i])
    ]
    alone = [target_scores(model, coder, [pair])[0].loss for pair in pairs]
    sizes: list[int] = []
    for batch_tokens in (1, 40, 10_000):
        sizes.clear()
        found = target_losses(model, coder, pairs, batch_tokens=batch_tokens, on_batch=sizes.append)
        assert found == pytest.approx(alone, rel=1e-5)
        assert sum(sizes) == len(pairs)
    assert sorted(sizes) == [1, 2, 10]


@pytest.mark.parametrize("kind", KINDS)
def test_routers_that_read_prompts_are_told_the_prompt(kind: str, tmp_path: Path) -> None:
    """Not the target: as if each pair went alone, whole, with its prompt named."""
    model = RoutedModel.from_pool(MODELS[kind](), make_pool(MODELS[kind], tmp_path), router="phatgoose-prior")
    coder = encoder(model)
    pairs = [
        (coder.prompt(text(2 + 5 * i, i)), coder.target(text(1 + c, 10 * i + c))) for i in range(4) for c in range(3)
    ]
    expected = []
    for prompt, target in pairs:
        row = coder.collate([coder.row(prompt, target)])
        labels_S = row.pop("labels")[0]
        with torch.no_grad(), model.prompts([prompt]):
            logits_SV = model(**row).logits[0]
        expected.append(torch.nn.functional.cross_entropy(logits_SV, labels_S, reduction="sum").item())
    for batch_tokens in (1, 60, 10_000):
        assert target_losses(model, coder, pairs, batch_tokens=batch_tokens) == pytest.approx(expected, rel=1e-5)
    plain = RoutedModel.from_pool(model.unwrap(), model.pool)
    assert target_losses(plain, coder, pairs) != pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("router", ["phatgoose", "phatgoose-prior"])
def test_pairs_can_lack_different_experts(router: str, tmp_path: Path) -> None:
    """The same prompt too, and answers as well as targets."""
    model = RoutedModel.from_pool(MODELS["llama"](), make_pool(MODELS["llama"], tmp_path), router=router)
    coder, names = encoder(model), [(), ("e0",), ("e1",), ("e0",)]
    texts = [text(6, 1), text(6, 1), text(6, 1), text(9, 2)]
    pairs = [(coder.prompt(prompt), coder.target(text(3, 5))) for prompt in texts]
    options = GenerationConfig(max_new_tokens=4)
    alone, written = [], []
    for pair, prompt, masked in zip(pairs, texts, names, strict=True):
        with model.without(masked):
            alone += target_losses(model, coder, [pair])
            written += answers(model, coder, [prompt], options)
    assert len({round(loss, 4) for loss in alone}) == 4
    assert target_losses(model, coder, pairs, without=names) == pytest.approx(alone, rel=1e-5)
    assert answers(model, coder, texts, options, without=names) == written


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_targets(kind: str) -> None:
    """A target is greedy if the model would write it, and no other of its length is."""
    model = MODELS[kind]()
    coder = encoder(model)
    prompt = coder.prompt(text(5, 1))
    first = {"input_ids": torch.tensor([prompt])}
    if model.config.is_encoder_decoder:
        first["decoder_input_ids"] = torch.tensor([[0]])
    best = int(model(**first).logits[0, -1].argmax())
    others = [token for token in range(3, 9) if token != best]
    pairs = [(prompt, [token]) for token in (best, *others)] + [(prompt, [best, others[0], others[0]])]
    assert [found.greedy for found in target_scores(model, coder, pairs)] == [True] + [False] * (len(others) + 1)
