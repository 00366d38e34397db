"""Many experts at once: each ends as if it had been trained alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.checks import assert_close
from helpers.data import encoder_of
from helpers.models import MODELS, ModelFactory, llama, make_tokenizer, t5
from helpers.pools import make_adapter
from helpers.training import GATE, LORA, SIZES, make_jobs
from phatgoose.config import AdapterTrainingConfig, BatchingConfig
from phatgoose.experts.expert import Expert
from phatgoose.training.group.data import GroupData
from phatgoose.training.group.jobs import TrainingJob
from phatgoose.training.group.matrix import ExpertMatrix
from phatgoose.training.group.model import BatchedLora, BatchedModel, needs_mask
from phatgoose.training.group.train import train_adapters, train_gates
from phatgoose.training.group.trainer import GroupTrainer
from phatgoose.training.lora import initial_factors, lora_layers, new_lora
from phatgoose.training.single import train_adapter, train_gate
from phatgoose.training.trainer import make_trainer

ONE_QUICK = ["llama", *(pytest.param(kind, marks=pytest.mark.slow) for kind in MODELS if kind != "llama")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def assert_same_adapters(found: Path, expected: Path, absolute: float = 1e-5) -> None:
    """One number in a thousand may be off by a tenth of a step.

    A step moves a number by 1e-3. AdamW divides by a gradient's size, so that rounding shows where it is smallest; how
    much differs between processors.
    """
    assert (found / "adapter_config.json").read_text() == (expected / "adapter_config.json").read_text()
    many, alone = weights(found), weights(expected)
    assert many.keys() == alone.keys()
    off = torch.cat([(many[name] - t).abs().flatten() for name, t in alone.items()])
    assert off.max() <= max(absolute, 1e-4)
    assert (off > absolute).float().mean() <= 1e-3, off.sort(descending=True).values[:10]


def assert_same_gates(found: Path, expected: Path) -> None:
    assert (found / "gate_config.json").read_text() == (expected / "gate_config.json").read_text()
    many, alone = Expert(found).load_gate(), Expert(expected).load_gate()
    assert many.keys() == alone.keys()
    for site, v in alone.items():
        assert v.abs().max() > 0
        torch.testing.assert_close(many[site], v, rtol=0, atol=1e-5)


def check_parity(factory: ModelFactory, folder: Path, sizes: tuple[int, ...]) -> None:
    jobs = make_jobs(folder / "many", sizes)
    model = factory()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modules = [(name, type(module)) for name, module in model.named_modules()]
    train_adapters(model, make_tokenizer(), jobs, config=LORA, progress=False)
    for job in jobs:
        alone = folder / "alone" / job.name
        train_adapter(factory(), make_tokenizer(), job.examples, alone, config=LORA, validation=job.validation)
        assert_same_adapters(job.folder, alone)
        shutil.rmtree(alone)
        shutil.copytree(job.folder, alone)
    train_gates(model, make_tokenizer(), jobs, config=GATE, progress=False)
    for job in jobs:
        alone = folder / "alone" / job.name
        train_gate(factory(), make_tokenizer(), Expert(alone), job.examples, config=GATE)
        assert_same_gates(job.folder, alone)
    assert {path.name for path in (folder / "many").iterdir()} == {job.name for job in jobs}
    assert [(name, type(module)) for name, module in model.named_modules()] == modules
    assert not model.training
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_each_expert_ends_as_if_trained_alone(kind: str, tmp_path: Path) -> None:
    check_parity(MODELS[kind], tmp_path, SIZES)


def test_one_expert(tmp_path: Path) -> None:
    check_parity(llama, tmp_path, (9,))


def group_trainer(
    model: Any, peft_model: Any, config: AdapterTrainingConfig, jobs: list[TrainingJob], work: Path
) -> GroupTrainer:
    layers = lora_layers(peft_model)
    matrix = ExpertMatrix(initial_factors(layers, len(jobs)), torch.float32)
    parameters = matrix.parameters
    batched = BatchedModel(
        model,
        {
            site: BatchedLora(
                layer.get_base_layer(),
                parameters[site + ".a"],
                parameters[site + ".b"],
                scaling=layer.scaling["default"],
            )
            for site, layer in layers.items()
        },
    )

    def alone(rows: Any, validation: Any) -> Any:
        save_steps = config.save_steps
        return make_trainer(
            batched, config, work, save_steps=save_steps, dataset=rows, validation=validation, collate=list
        )

    data = GroupData(
        encoder_of(model),
        [job.examples for job in jobs],
        [job.validation for job in jobs],
        alone,
        length_multiple=8,
        with_mask=needs_mask(model),
    )
    return GroupTrainer(batched, matrix, data, config, work / "run", {})


@pytest.mark.parametrize("factory", [llama, pytest.param(t5, marks=pytest.mark.slow)])
def test_losses_are_those_of_each_alone(factory: ModelFactory, tmp_path: Path) -> None:
    """In training, step by step, and on the validation rows."""
    jobs, config = make_jobs(tmp_path), replace(LORA, learning_rate=1e-2)
    logs = []
    for job in jobs:
        model = factory()
        encoder = encoder_of(model)

        def collate(rows: list[dict[str, list[int]]], encoder: Any = encoder) -> dict[str, torch.Tensor]:
            batch = encoder.collate(rows)
            batch["targets"] = batch.pop("labels")
            return batch

        with new_lora(model, config) as peft_model:
            trainer = make_trainer(
                peft_model,
                config,
                tmp_path / f"{job.name}.work",
                save_steps=config.save_steps,
                dataset=[encoder.encode(example) for example in job.examples],
                validation=[encoder.encode(example) for example in job.validation],
                collate=collate,
            )
            trainer.train()
            logs.append(trainer.state.log_history)
    model = factory()
    with new_lora(model, config) as peft_model:
        trainer = group_trainer(model, peft_model, config, jobs, tmp_path / "many")
        losses, evaluations = [], []
        for step, batches in enumerate(trainer.data.steps(), start=1):
            losses.append(trainer.step(batches))
            if step % config.save_steps == 0:
                evaluations.append(trainer.evaluate())
        trainer.model.unwrap()
    for e, job in enumerate(jobs):
        expected = torch.tensor([entry["loss"] for entry in logs[e] if "loss" in entry])
        assert len(expected) == config.steps
        assert_close(torch.stack(losses)[:, e], expected)
        found = torch.stack(evaluations)[:, e]
        if job.validation:
            assert_close(found, torch.tensor([entry["eval_loss"] for entry in logs[e] if "eval_loss" in entry]))
        else:
            assert found.isnan().all()


def test_an_expert_that_diverges_harms_no_other(tmp_path: Path) -> None:
    found = []
    for spoiled in (False, True):
        model = llama()
        with new_lora(model, LORA) as peft_model:
            trainer = group_trainer(model, peft_model, LORA, make_jobs(tmp_path), tmp_path / str(spoiled))
            if spoiled:
                trainer.matrix.master_EP.data[1] = torch.nan
            found.append(trainer.train())
            trainer.model.unwrap()
    assert found[1][1].isnan().all()
    assert torch.equal(found[0][[0, 2]], found[1][[0, 2]])


@pytest.mark.slow
def test_the_best_checkpoint_of_each(tmp_path: Path) -> None:
    """The validation data of the first and the last expert contradicts what they learn; the other keeps on learning."""
    config = replace(LORA, steps=12, learning_rate=5e-2)
    jobs = []
    for job in make_jobs(tmp_path / "many"):
        examples = [replace(example, target=" ".join(["<7>"] * 5)) for example in job.examples]
        other = [replace(example, target=" ".join(["<9>"] * 20)) for example in examples[:5]]
        jobs.append(replace(job, examples=examples, validation=examples if job.name == "e1" else other))
    train_adapters(llama(), make_tokenizer(), jobs, config=config, progress=False)
    last = [replace(job, folder=tmp_path / "last" / job.name, validation=()) for job in jobs]
    train_adapters(llama(), make_tokenizer(), last, config=config, progress=False)
    for job, of_last in zip(jobs, last, strict=True):
        kept, ended = weights(job.folder), weights(of_last.folder)
        assert all(torch.equal(kept[name], t) for name, t in ended.items()) == (job.name == "e1")
        if job.name != "e1":  # whose twelve steps at this rate are beyond comparing
            alone = tmp_path / "alone" / job.name
            train_adapter(llama(), make_tokenizer(), job.examples, alone, config=config, validation=job.validation)
            assert_same_adapters(job.folder, alone, 1e-4)


@pytest.mark.slow
def test_an_adapted_output_head(tmp_path: Path) -> None:
    config = replace(LORA, target_modules="q_proj,lm_head")
    jobs = make_jobs(tmp_path / "many")
    train_adapters(llama(), make_tokenizer(), jobs, config=config, progress=False)
    for job in jobs:
        alone = tmp_path / "alone" / job.name
        train_adapter(llama(), make_tokenizer(), job.examples, alone, config=config, validation=job.validation)
        assert_same_adapters(job.folder, alone)


@pytest.mark.slow
def test_gates_of_unlike_adapters(tmp_path: Path) -> None:
    """Other ranks, scales and sites, which one stack pads."""
    options = [{"r": 8}, {"r": 3, "lora_alpha": 5}, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}]
    jobs = make_jobs(tmp_path)
    for i, (job, lora) in enumerate(zip(jobs, options, strict=True)):
        make_adapter(llama, job.folder, seed=i, **lora)
        make_adapter(llama, tmp_path / "alone" / job.name, seed=i, **lora)
    train_gates(llama(), make_tokenizer(), jobs, config=GATE, progress=False)
    for job in jobs:
        alone = tmp_path / "alone" / job.name
        train_gate(llama(), make_tokenizer(), Expert(alone), job.examples, config=GATE)
        assert_same_gates(job.folder, alone)


@pytest.mark.slow
def test_compiled_blocks(tmp_path: Path) -> None:
    for name, batching in (("plain", BatchingConfig()), ("compiled", BatchingConfig(compile=True))):
        jobs = make_jobs(tmp_path / name)
        train_adapters(llama(), make_tokenizer(), jobs, config=LORA, batching=batching, progress=False)
    for job in make_jobs(tmp_path / "compiled"):
        assert_same_adapters(job.folder, tmp_path / "plain" / job.name)


def test_bf16(tmp_path: Path) -> None:
    jobs, model = make_jobs(tmp_path), llama().to(torch.bfloat16)
    config, gate_config = replace(LORA, dtype="bf16"), replace(GATE, dtype="bf16")
    train_adapters(model, make_tokenizer(), jobs, config=config, save_dtype="bf16", progress=False)
    train_gates(model, make_tokenizer(), jobs, config=gate_config, save_dtype="bf16", progress=False)
    for job in jobs:
        assert {t.dtype for t in weights(job.folder).values()} == {torch.bfloat16}
        assert all(v.abs().max() > 0 for v in Expert(job.folder).load_gate().values())
