"""Training: only what should move moves, what is saved is right, and a killed run resumes."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import phatgoose
from helpers.checks import assert_close, files_of
from helpers.data import as_text, token_ids
from helpers.models import MODELS, ModelFactory, llama, make_tokenizer, t5
from helpers.pools import make_adapter
from helpers.training import EXAMPLES, start, train_one_long
from phatgoose.config import AdapterTrainingConfig, GateConfig, TextConfig
from phatgoose.data.encoder import IGNORED, Encoder
from phatgoose.data.examples import Example, fingerprint
from phatgoose.errors import AdapterError, ConfigError
from phatgoose.experts.expert import Expert
from phatgoose.files import sha256
from phatgoose.routing.model import RoutedModel
from phatgoose.training.gated import GatedModel
from phatgoose.training.single import train_adapter, train_gate
from phatgoose.training.trainer import target_loss

SMALL = AdapterTrainingConfig(steps=6, batch_size=4, rank=3, save_steps=3, learning_rate=1e-2)
SHORT_GATE = GateConfig(steps=6, batch_size=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("kind", MODELS)
def test_adapter_and_gate(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    folder = train_adapter(model, make_tokenizer(), EXAMPLES, tmp_path / "mine", config=SMALL, validation=EXAMPLES[:4])
    assert not (tmp_path / "mine.training").exists()
    assert any(t.abs().max() > 0 for name, t in weights(folder).items() if "lora_B" in name)
    adapter_files = files_of(folder)
    with torch.no_grad():
        peft_logits = PeftModel.from_pretrained(MODELS[kind](), str(folder))(**_inputs(model)).logits

    vectors = train_gate(model, make_tokenizer(), Expert(folder), EXAMPLES, config=SHORT_GATE)
    assert {name: digest for name, digest in files_of(folder).items() if name in adapter_files} == adapter_files
    assert not (tmp_path / "mine.gating").exists()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], t) for name, t in before.items())
    assert set(vectors) == set(Expert(folder).shapes)
    assert all(v.abs().max() > 0 for v in vectors.values())
    assert all(torch.equal(v, vectors[site]) for site, v in Expert(folder).load_gate().items())
    with torch.no_grad():  # still a valid PEFT adapter
        assert torch.equal(PeftModel.from_pretrained(MODELS[kind](), str(folder))(**_inputs(model)).logits, peft_logits)

    pool = phatgoose.Pool.create(tmp_path / "pool", f"tiny-{kind}")
    pool.add(folder)
    routed = RoutedModel.from_pool(model, pool, top_k=1)
    with torch.no_grad():
        torch.testing.assert_close(routed(**_inputs(model)).logits, peft_logits, rtol=1e-4, atol=1e-4)


def _inputs(model: Any) -> dict[str, torch.Tensor]:
    inputs = {"input_ids": token_ids(2, 6)}
    return inputs | ({"decoder_input_ids": token_ids(2, 3)} if model.config.is_encoder_decoder else {})


def test_gate_config_says_where_a_gate_comes_from(tmp_path: Path) -> None:
    make_adapter(llama, tmp_path / "e")
    config = GateConfig(steps=2, batch_size=2, accumulation=2, learning_rate=1e-3, seed=7)
    train_gate(llama(), make_tokenizer(), Expert(tmp_path / "e"), EXAMPLES, config=config, save_dtype="bf16")
    found = json.loads((tmp_path / "e" / "gate_config.json").read_text())
    expected = {
        "base": "tiny-llama",
        "data": fingerprint(EXAMPLES),
        "adapter_sha256": sha256(tmp_path / "e" / "adapter_model.safetensors"),
        "steps": 2,
        "learning_rate": 1e-3,
        "seed": 7,
        "phatgoose": phatgoose.__version__,
    }
    assert {key: found[key] for key in expected} == expected
    assert found["settings"]["training"]["accumulation"] == 2
    stored = load_file(tmp_path / "e" / "gate.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}


def test_accumulation_is_a_larger_batch(tmp_path: Path) -> None:
    """Rows of one length: the mean of means is the mean."""
    rows = [Example(input=as_text([3 + i, 4, 5]), target=as_text([6 + i, 7])) for i in range(4)]
    found = []
    for name, batch_size, accumulation in (("a", 4, 1), ("b", 2, 2)):
        make_adapter(t5, tmp_path / name)
        config = GateConfig(steps=3, batch_size=batch_size, accumulation=accumulation)
        found.append(train_gate(t5(), make_tokenizer(), Expert(tmp_path / name), rows, config=config))
    for site, v in found[0].items():
        torch.testing.assert_close(v, found[1][site], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("factory", [llama, t5])
def test_padding_trains_nothing(factory: ModelFactory, tmp_path: Path) -> None:
    """Rows of unlike lengths in one batch give the gates the gradients that they give one by one."""
    model = factory()
    encoder = Encoder(make_tokenizer(), model.config, TextConfig())
    gated = GatedModel(model, Expert(make_adapter(factory, tmp_path / "e")))
    rows = [encoder.encode(Example(input=as_text([3] * n), target=as_text([7] * m))) for n, m in ((9, 1), (2, 4))]
    found = []
    for batches in ([rows], [rows[:1], rows[1:]]):
        gated.zero_grad()
        for batch in map(encoder.collate, batches):
            labels = batch.pop("labels")
            share = (labels != IGNORED).sum() / sum(label != IGNORED for row in rows for label in row["labels"])
            (share * target_loss(gated(**batch).logits, labels)).backward()
        found.append(torch.cat([v.grad for v in gated.gates().values()]))
    assert_close(*found)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["adapter", "gate"])
def test_a_killed_run_ends_at_the_same_weights(what: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    work = killed.with_name("killed.training" if what == "adapter" else "killed.gating")
    if what == "gate":
        make_adapter(llama, whole)
        make_adapter(llama, killed)
    before = files_of(killed) if what == "gate" else None
    child = start("train_one_long", what, killed)
    deadline = time.monotonic() + 240
    while not any(work.glob("checkpoint-*/trainer_state.json")):
        assert child.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    if what == "gate":
        assert files_of(killed) == before
    else:
        assert not killed.exists()
    for folder in (killed, whole):
        train_one_long(what, folder)
    file = "adapter_model.safetensors" if what == "adapter" else "gate.safetensors"
    found, expected = load_file(killed / file), load_file(whole / file)
    assert all(torch.equal(found[name], t) for name, t in expected.items())


def test_an_unfinished_run_with_other_settings(tmp_path: Path) -> None:
    work = tmp_path / "mine.training"
    work.mkdir()
    (work / "run.json").write_text('{"steps": 99}')
    with pytest.raises(ConfigError, match="other settings"):
        train_adapter(llama(), make_tokenizer(), EXAMPLES, tmp_path / "mine", config=SMALL)
    assert (work / "run.json").read_text() == '{"steps": 99}'


def test_an_adapter_is_never_overwritten(tmp_path: Path) -> None:
    make_adapter(llama, tmp_path / "mine")
    before = files_of(tmp_path)
    with pytest.raises(AdapterError, match="exists already"):
        train_adapter(llama(), make_tokenizer(), EXAMPLES, tmp_path / "mine", config=SMALL)
    assert files_of(tmp_path) == before


def test_bf16(tmp_path: Path) -> None:
    config = AdapterTrainingConfig(steps=3, batch_size=4, rank=2, dtype="bf16")
    model = llama().to(torch.bfloat16)
    train_adapter(model, make_tokenizer(), EXAMPLES, tmp_path / "e", config=config, save_dtype="bf16")
    assert {t.dtype for t in weights(tmp_path / "e").values()} == {torch.bfloat16}
    gate_config = GateConfig(steps=3, batch_size=4, dtype="bf16")
    vectors = train_gate(model, make_tokenizer(), Expert(tmp_path / "e"), EXAMPLES, config=gate_config)
    assert {v.dtype for v in vectors.values()} == {torch.float32}


@pytest.mark.parametrize(
    "last",
    [
        pytest.param("without its state", marks=pytest.mark.slow),
        "with half a state",
        pytest.param("without anything", marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_while_it_wrote_a_checkpoint(last: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint without its last file is passed over, not tripped over."""
    whole = train_adapter(llama(), make_tokenizer(), EXAMPLES, tmp_path / "whole", config=SMALL)

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("phatgoose.training.single.save_lora", full_disk)
        with pytest.raises(OSError, match="No space left"):
            train_adapter(llama(), make_tokenizer(), EXAMPLES, tmp_path / "killed", config=SMALL)
    (checkpoint,) = (tmp_path / "killed.training").glob("checkpoint-6")
    state = checkpoint / "trainer_state.json"
    if last == "without its state":
        state.unlink()
    elif last == "with half a state":
        state.write_text(state.read_text()[:40])
    else:
        for file in checkpoint.iterdir():
            file.unlink()
    killed = train_adapter(llama(), make_tokenizer(), EXAMPLES, tmp_path / "killed", config=SMALL)
    assert all(torch.equal(weights(killed)[name], t) for name, t in weights(whole).items())


@pytest.mark.parametrize("steps", [5, pytest.param(6, marks=pytest.mark.slow)])  # an epoch has 6
@pytest.mark.parametrize("what", ["adapter", "gate"])
def test_a_run_that_could_not_save_its_result(
    what: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It trains no further than `steps` when it is started again."""
    adapter_config, gate_config = replace(SMALL, steps=steps, save_steps=steps), replace(SHORT_GATE, steps=steps)

    def train(name: str) -> Path:
        if what == "adapter":
            return train_adapter(llama(), make_tokenizer(), EXAMPLES, tmp_path / name, config=adapter_config)
        if not (tmp_path / name).exists():
            make_adapter(llama, tmp_path / name)
        train_gate(llama(), make_tokenizer(), Expert(tmp_path / name), EXAMPLES, config=gate_config)
        return tmp_path / name

    def full_disk(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(
            "phatgoose.training.single.save_lora" if what == "adapter" else "phatgoose.training.single.save_gate",
            full_disk,
        )
        with pytest.raises(OSError, match="No space left"):
            train("late")
    assert not (tmp_path / "late" / "gate.safetensors").exists()
    file = "adapter_model.safetensors" if what == "adapter" else "gate.safetensors"
    found, expected = (load_file(train(name) / file) for name in ("late", "whole"))
    assert all(torch.equal(found[name], t) for name, t in expected.items())
