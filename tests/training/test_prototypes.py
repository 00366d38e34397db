"""Mean activations and embeddings: what they are, how they are kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from helpers.checks import assert_close, fails, files_of
from helpers.data import as_text, token_ids
from helpers.models import MODELS, llama, make_tokenizer
from helpers.pools import fill_pool, make_adapter
from phatgoose.cli import app
from phatgoose.config import TextConfig
from phatgoose.data.encoder import Encoder
from phatgoose.data.examples import Example
from phatgoose.errors import PrototypeError
from phatgoose.experts.adapter import PREFIX
from phatgoose.experts.embeddings import ENCODER, SentenceEncoder, load_embeddings, save_example_embeddings
from phatgoose.experts.expert import Expert
from phatgoose.experts.pool import Pool
from phatgoose.training.mean_activations import mean_activations, save_mean_activations

EXAMPLES = [
    Example(input=as_text(token_ids(length, seed=i).tolist()), target=as_text(token_ids(1 + i, seed=50 + i).tolist()))
    for i, length in enumerate((4, 9, 2, 6, 7))
]


@torch.no_grad()
def plain_means(kind: str, folder: Path) -> dict[str, torch.Tensor]:
    """One example at a time through PEFT's model, with hooks."""
    model = PeftModel.from_pretrained(MODELS[kind](), folder)
    encoder = Encoder(make_tokenizer(), model.config, TextConfig())
    sums: dict[str, Any] = {}
    for site in Expert(folder).shapes:
        layer = model.get_submodule((PREFIX + site).rstrip("."))

        def keep(_: Any, args: Any, site: str = site) -> None:
            sums[site] = sums.get(site, 0) + args[0][0].double().mean(dim=0)

        layer.register_forward_pre_hook(keep)
    for example in EXAMPLES:
        row = {name: torch.tensor([ids]) for name, ids in encoder.encode(example).items() if name != "labels"}
        model(**row)
    return {site: total / len(EXAMPLES) for site, total in sums.items()}


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("kind", MODELS)
def test_mean_activations(kind: str, batch_size: int, tmp_path: Path) -> None:
    folder = make_adapter(MODELS[kind], tmp_path / "e0")
    model = MODELS[kind]()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    encoder = Encoder(make_tokenizer(), model.config, TextConfig())
    found = mean_activations(model, encoder, Expert(folder), EXAMPLES, batch_size)
    expected = plain_means(kind, folder)
    assert found.keys() == expected.keys()
    for site, mean_I in expected.items():
        assert_close(found[site], mean_I)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_mean_activations_on_disk(tmp_path: Path) -> None:
    expert = Expert(make_adapter(llama, tmp_path / "e0"))
    adapter_before = {name: digest for name, digest in files_of(expert.folder).items() if name.startswith("adapter")}
    vectors = save_mean_activations(llama(), make_tokenizer(), expert, EXAMPLES, num_examples=3, seed=4)
    loaded = expert.load_activations()
    assert all(torch.equal(loaded[site], v) for site, v in vectors.items())
    config = json.loads((expert.folder / "activations_config.json").read_text(encoding="utf-8"))
    assert (config["base"], config["num_examples"], config["settings"]["seed"]) == ("tiny-llama", 3, 4)
    assert adapter_before.items() <= files_of(expert.folder).items()
    PeftModel.from_pretrained(llama(), expert.folder)  # still an adapter of PEFT
    other = save_mean_activations(llama(), make_tokenizer(), expert, EXAMPLES, num_examples=3, seed=5)
    assert any(not torch.equal(other[site], vectors[site]) for site in vectors)


def test_embeddings(tmp_path: Path) -> None:
    expert = Expert(make_adapter(llama, tmp_path / "e0"))
    texts = ["the cat sat on the mat", "stocks fell on Monday", "what is the capital of Peru?"]
    found_MD = save_example_embeddings(expert.folder, [Example(input=text, target="") for text in texts], seed=1)
    assert found_MD.shape == (3, 384)
    torch.testing.assert_close(found_MD.norm(dim=1), torch.ones(3))
    assert torch.equal(load_embeddings(expert.folder, ENCODER), found_MD)
    # a paraphrase finds its own text
    (query_D,) = SentenceEncoder().embed(["Which city is Peru's capital?"])
    alone = SentenceEncoder().embed(texts)
    torch.testing.assert_close((query_D @ found_MD.T).max(), query_D @ alone[2], rtol=0, atol=1e-5)
    with safe_open(expert.folder / "embeddings.safetensors", framework="pt") as file:
        content = json.dumps(file.metadata())
    assert not any(text in content for text in texts)  # the texts stay with their owner


@pytest.mark.parametrize("file", ["activations.safetensors", "embeddings.safetensors"])
def test_damaged_files_are_refused(file: str, tmp_path: Path) -> None:
    expert = Expert(make_adapter(llama, tmp_path / "e0"))
    save_mean_activations(llama(), make_tokenizer(), expert, EXAMPLES)
    save_example_embeddings(expert.folder, EXAMPLES)
    pool = fill_pool(tmp_path / "pool", "tiny-llama", [expert.folder])
    assert pool.check() == []
    assert {"activations.safetensors", "embeddings.safetensors"} <= pool.entry("e0").files.keys()

    def load(folder: Path) -> Any:
        return Expert(folder).load_activations() if "act" in file else load_embeddings(folder, ENCODER)

    path = expert.folder / file
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    error = fails(PrototypeError, str(path), action=lambda: load(expert.folder))
    assert str(error.fix).startswith(f"phatgoose {file.split('.')[0]} {expert.folder}")
    # not even into a pool
    error = fails(PrototypeError, str(path), action=lambda: pool.add(expert.folder, "again"))
    assert pool.names == ("e0",)
    path.unlink()
    fails(PrototypeError, f"no {file}", action=lambda: load(expert.folder))


def test_activations_of_another_adapter_are_refused(tmp_path: Path) -> None:
    expert = Expert(make_adapter(llama, tmp_path / "e0"))
    save_mean_activations(llama(), make_tokenizer(), expert, EXAMPLES)
    make_adapter(llama, tmp_path / "e0", seed=3)
    fails(PrototypeError, "another adapter", action=Expert(tmp_path / "e0").load_activations)


def test_embeddings_of_another_encoder_are_refused(tmp_path: Path) -> None:
    expert = Expert(make_adapter(llama, tmp_path / "e0"))
    save_example_embeddings(expert.folder, EXAMPLES)
    fails(PrototypeError, "another-encoder", ENCODER, action=lambda: load_embeddings(expert.folder, "another-encoder"))


@pytest.mark.parametrize("inside_a_pool", [False, True])
def test_commands(inside_a_pool: bool, tmp_path: Path) -> None:
    base = tmp_path / "tiny-llama"
    llama().save_pretrained(base)
    make_tokenizer().save_pretrained(base)
    folder = make_adapter(llama, tmp_path / "e0")
    if inside_a_pool:
        folder = fill_pool(tmp_path / "pool", str(base), [folder]).expert("e0").folder
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input": e.input, "target": e.target}) + "\n" for e in EXAMPLES))
    for command, options in (("activations", ["--base", str(base)]), ("embeddings", [])):
        result = CliRunner().invoke(app, [command, str(folder), "--data", str(data), "--num-examples", "4", *options])
        assert result.exit_code == 0, result.output
    if inside_a_pool:
        pool = Pool.open(tmp_path / "pool")
        assert pool.check() == []
        folder = pool.expert("e0").folder
    assert len(Expert(folder).load_activations()) == len(Expert(folder).shapes)
    assert load_file(folder / "embeddings.safetensors")["embeddings"].shape == (4, 384)
