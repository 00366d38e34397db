"""Recorded routing against a slow, obvious computation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.checks import fails
from helpers.grids import SEPARATOR, held_in, words, write_rows
from helpers.models import MODELS, make_tokenizer
from helpers.routing import make_pool, routed
from phatgoose.analysis.recorder import record_task
from phatgoose.analysis.site_usage import TokenWeights
from phatgoose.config import TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.errors import BaseModelError
from phatgoose.evaluation.suites.held_in import HeldInTask, held_in_tasks
from phatgoose.routing.model import RoutedModel
from phatgoose.routing.state import IDLE

TOKEN_LEVEL = ("phatgoose", "average-activation", "arrow", "arrow-peft", "spectr", "lag", "uniform", "merged")
PROMPT_LEVEL = ("retrieval", "glider", "phatgoose-prior")


def make_task(folder: Path, suite: str = "held-in", rows: int = 11) -> HeldInTask:
    """Of expert e1; prompts of 2 to 10 tokens, targets of 2 to 4."""
    found = held_in("e1", 2 * rows, 3000, with_choices=True)
    write_rows(folder / "data" / "t0hi" / "e1.jsonl.gz", found)
    (task,) = held_in_tasks(suite, ["e1"], folder / "data", None)
    assert len({len(row.input.split()) for row in task.rows}) > 5
    return task


def encoder_of(model: RoutedModel) -> Encoder:
    return Encoder(make_tokenizer(), model.config, TextConfig(separator=SEPARATOR))


def entropy(shares: torch.Tensor) -> torch.Tensor:
    return -sum(p * p.log() if p > 0 else p.new_zeros(()) for p in shares.double())


def slowly(model: RoutedModel, encoder: Encoder, task: HeldInTask) -> dict[str, Any]:
    """Row by row without padding, token by token; the scores from activations that hooks catch."""
    linears = model.routed_linears()
    rows = []
    for row in task.rows:
        prompt, target = encoder.prompt(row.input), encoder.target(row.targets[0])
        inputs = {"input_ids": torch.tensor([prompt if encoder.encoder_decoder else prompt + target[:-1]])}
        if encoder.encoder_decoder:
            inputs["decoder_input_ids"] = torch.tensor([[encoder.start_id, *target[:-1]]])
        caught: dict[str, torch.Tensor] = {}
        biases: dict[str, torch.Tensor | None] = {}

        def catch(module: Any, args: Any, caught: Any = caught, biases: Any = biases) -> None:
            site = next(name for name, linear in linears.items() if linear is module)
            caught[site], biases[site] = args[0].detach()[0], model.state.current().bias_BE(site)

        hooks = [linear.register_forward_pre_hook(catch) for linear in linears.values()]
        with torch.no_grad(), model.prompts([prompt]), model.trace() as trace:
            model(**inputs)
        for hook in hooks:
            hook.remove()
        found: dict[str, list[Any]] = {"weights": [], "all": [], "chosen": []}
        for site, linear in linears.items():
            x_SI = caught[site]
            scores_SE = linear.router.final_scores(
                x_SI, None, model.state.current().mask_1E
            )  # of Lag, the two rules together
            if type(linear.router).__name__ != "Lag":
                scores_SE = linear.router.scores(x_SI) + linear.router.absent_E + model.mask_BE(1)
            if biases[site] is not None:
                scores_SE = scores_SE + biases[site]
            shares_SE = torch.softmax(scores_SE.double() / model.router_config.temperature, dim=-1)
            found["weights"].append(trace.weights(site)[0].double().mean(dim=0))
            found["all"].append(torch.stack([entropy(row_E) for row_E in shares_SE]).mean())
            found["chosen"].append(torch.stack([entropy(w_K) for w_K in trace.routing(site).weights_BSK[0]]).mean())
        rows.append({name: torch.stack(values) for name, values in found.items()})
    return {name: torch.stack([row[name] for row in rows]).mean(dim=0).numpy() for name in ("weights", "all", "chosen")}


def check(model: RoutedModel, task: HeldInTask, masked: tuple[str, ...] = ()) -> Any:
    encoder = encoder_of(model)
    found = record_task(model, encoder, task, batch_tokens=50)
    if masked:
        with model.without(masked):
            expected = slowly(model, encoder, task)
    else:
        expected = slowly(model, encoder, task)
    # fp32 sums of up to 11 rows, and logits that padding rounds otherwise
    np.testing.assert_allclose(found.weights_ME, expected["weights"], atol=5e-6)
    np.testing.assert_allclose(found.entropy_all_M, expected["all"], atol=5e-6)
    np.testing.assert_allclose(found.entropy_chosen_M, expected["chosen"], atol=5e-6)
    assert found.num_rows == len(task.rows)
    return found


@pytest.mark.parametrize("router", [*TOKEN_LEVEL, *PROMPT_LEVEL])
def test_every_router_in_padded_batches(router: str, tmp_path: Path) -> None:
    pool = make_pool("llama", tmp_path)
    model = routed(MODELS["llama"](), pool, router=router, filter_k=2, temperature=0.7)
    found = check(model, make_task(tmp_path))
    assert found.usable_M.tolist() == [4] * 14
    if router in ("uniform", "merged"):
        np.testing.assert_allclose(found.entropy_all_M, math.log(4), rtol=1e-6)
    elif router == "retrieval":
        assert np.abs(found.entropy_all_M).max() < 1e-6
    else:
        assert found.entropy_all_M.std() > (1e-5 if router == "arrow" else 1e-4)
        assert found.weights_ME.std() > 0.01


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_other_models(kind: str, tmp_path: Path) -> None:
    model = routed(MODELS[kind](), make_pool(kind, tmp_path))
    check(model, make_task(tmp_path))


@pytest.mark.parametrize("router", ["phatgoose", "phatgoose-prior", "retrieval", "lag"])
def test_leave_one_out(router: str, tmp_path: Path) -> None:
    model = routed(MODELS["llama"](), make_pool("llama", tmp_path), router=router)
    found = check(model, make_task(tmp_path, "leave-one-out"), masked=("e1",))
    assert found.masked == ("e1",)
    assert found.weights_ME[:, 1].tolist() == [0] * 14
    assert found.usable_M.tolist() == [3] * 14
    np.testing.assert_allclose(found.weights_ME.sum(axis=1), 1, atol=1e-6)
    assert model.state.current() is IDLE


def test_the_size_of_batches_changes_nothing(tmp_path: Path) -> None:
    model = routed(MODELS["llama"](), make_pool("llama", tmp_path))
    task, encoder = make_task(tmp_path), encoder_of(model)
    alone, all_at_once = (record_task(model, encoder, task, batch_tokens=size) for size in (1, 10_000))
    np.testing.assert_allclose(alone.weights_ME, all_at_once.weights_ME, atol=2e-6)
    np.testing.assert_allclose(alone.entropy_all_M, all_at_once.entropy_all_M, atol=5e-6)


def test_rows_weigh_equally(tmp_path: Path) -> None:
    """A long row beside a short one: the mean of what each gives alone."""
    model = routed(MODELS["llama"](), make_pool("llama", tmp_path))
    row = {"choices": None, "split": "validation"}
    rows = [
        row | {"input": words(length, length), "target": words(1, length), "example_id": str(length)}
        for length in (1, 40)
    ]
    parts = []
    for number, some in enumerate(([rows[0]], [rows[1]], rows)):
        write_rows(tmp_path / str(number) / "t0hi" / "e1.jsonl.gz", some)
        (task,) = held_in_tasks("held-in", ["e1"], tmp_path / str(number), None)
        parts.append(record_task(model, encoder_of(model), task, batch_tokens=500).weights_ME)
    assert np.abs(parts[0] - parts[1]).max() > 0.1
    np.testing.assert_allclose(parts[2], (parts[0] + parts[1]) / 2, atol=5e-6)


def test_a_site_that_an_expert_leaves_alone(tmp_path: Path) -> None:
    from helpers.models import llama
    from helpers.pools import fill_pool, make_expert

    experts = [make_expert(llama, tmp_path / "e0"), make_expert(llama, tmp_path / "e1", 1, target_modules=["q_proj"])]
    model = routed(llama(), fill_pool(tmp_path / "pool", "tiny-llama", experts))
    found = record_task(model, encoder_of(model), make_task(tmp_path), batch_tokens=100)
    q = ["q_proj" in site for site in model.routed_linears()]
    assert found.usable_M.tolist() == [2 if is_q else 1 for is_q in q]
    assert found.entropy_all_M[~np.array(q)].tolist() == [0] * 12


def test_a_site_that_no_token_passes_is_not_zero(tmp_path: Path) -> None:
    model = routed(MODELS["llama"](), make_pool("llama", tmp_path))
    # what a multimodal model's other tower is for texts: routed, but never called
    model.model.idle = torch.nn.ModuleList([routed(MODELS["llama"](), model.pool).model.model.layers[0].mlp])
    found = record_task(model, encoder_of(model), make_task(tmp_path), batch_tokens=100)
    idle = ["idle" in site for site in model.routed_linears()]
    assert sum(idle) == 3
    assert np.isnan(found.weights_ME).all(axis=1).tolist() == idle
    assert np.isnan(found.entropy_all_M).tolist() == idle


def test_activations_that_are_not_the_tokens(tmp_path: Path) -> None:
    model = routed(MODELS["llama"](), make_pool("llama", tmp_path))
    from phatgoose.analysis.recorder import SiteUsage

    site, linear = next(iter(model.routed_linears().items()))
    tokens = TokenWeights()
    tokens.set({"text": torch.ones(2, 3)})
    with model.recording({site: SiteUsage(site, "text", linear, tokens, 1.0)}):
        linear(torch.randn(6, 32))
        fails(BaseModelError, site, "5 activations", "6, padding included", action=lambda: linear(torch.randn(5, 32)))
