"""What users get wrong: one message, exit code 2, and the disk as it was."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from helpers.checks import files_of
from helpers.cli import CHECKPOINT, PROMPT, SHORT, make_broken_bases, make_workshop, run
from helpers.golden import GOLDEN
from phatgoose.cli import main
from phatgoose.experts.pool import Pool


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_workshop(tmp_path_factory.mktemp("template"))
    make_broken_bases(folder)
    return folder


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workshop of its own for each test, and the present folder."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "here"))
    return tmp_path / "here"


TRAIN = ["train", "data.jsonl", "--base", "tiny-llama", "--out", "new", "--steps", "2"]
GATE = ["gate", "bare", "--data", "data.jsonl", "--steps", "2"]
ASK = ["generate", PROMPT, "--pool", "pool", *SHORT]
ROUTER = [*ASK, "--router"]
IMPORT = ["pool", "import-official", CHECKPOINT, "--base", str(GOLDEN / "base"), "--out", "new"]

# arguments -> words of the message
ERRORS: list[tuple[list[str], list[str]]] = [
    (["train", "none.jsonl", *TRAIN[2:]], ["none.jsonl"]),
    ([*TRAIN, "--out", "e0"], ["e0 exists already", "--out"]),
    ([*TRAIN, "--base", "nowhere"], ["'nowhere'"]),
    ([*TRAIN, "--base", "./nowhere"], ["'./nowhere'", "no such folder"]),
    ([*TRAIN, "--base", "thin/tiny-llama"], ["lacks weights", "layers.2"]),
    ([*TRAIN, "--base", "cut/tiny-llama"], ["cut/tiny-llama"]),
    ([*TRAIN, "--base", "mute/tiny-llama"], ["tokenizer", "mute/tiny-llama"]),
    ([*TRAIN, "--split", "test"], ["no examples", "'test'"]),
    ([*TRAIN, "--validation-split", "dev"], ["no examples", "'dev'"]),
    ([*TRAIN, "--target-modules", "frogs"], ["frogs"]),
    ([*TRAIN, "--target-modules", "embed_tokens"], ["embed_tokens", "Embedding"]),
    ([*TRAIN, "--rank", "0"], ["rank", "0"]),
    ([*TRAIN, "--learning-rate", "nan"], ["learning_rate", "nan"]),
    ([*TRAIN, "--learning-rate", "inf"], ["learning_rate", "inf"]),
    ([*TRAIN, "--seed", "-1"], ["seed", "-1"]),
    ([*TRAIN, "--device", "toaster"], ["'toaster'", "--device"]),
    ([*TRAIN, "--out", "data.jsonl/new"], ["data.jsonl/new", "Not a directory"]),
    ([*ROUTER, "single"], ["--router single --expert e0"]),
    ([*ROUTER, "single", "--expert", "e9"], ["'e9'", "e0, e1"]),
    ([*ROUTER, "retrieval"], ["embeddings", "e0, e1", "phatgoose embeddings"]),
    ([*ROUTER, "arrow", "--option", "warmth=1"], ["'warmth=1'", "temperature"]),
    ([*ROUTER, "arrow", "--option", "temperature"], ["temperature without a value"]),
    ([*ROUTER, "arrow", "--option", "temperature=hot"], ["temperature=hot"]),
    ([*ROUTER, "arrow", "--option", "temperature=0"], ["temperature must be positive"]),
    (["train-many", *TRAIN[1:], "--joint-gates"], ["--joint-gates", "fix: python recipes/ocean"]),
    (["train-many", *TRAIN[1:], "--ray-gpus", "1"], ["Ray cluster", "--executor ray"]),
    (["activations", "e0", "--data", "data.jsonl", "--num-examples", "0"], ["num_examples", "0"]),
    (["embeddings", "e0", "--data", "data.jsonl", "--num-examples", "0"], ["num_examples", "0"]),
    (["gate", "nowhere", *GATE[2:]], ["nowhere", "no such folder"]),
    (["gate", "tiny-llama", *GATE[2:]], ["tiny-llama", "adapter_config.json"]),
    ([*GATE, "--data", "none.jsonl"], ["none.jsonl"]),
    ([*GATE, "--base", "tiny-t5"], ["tiny-t5", "tiny-llama"]),
    ([*GATE, "--steps", "0"], ["steps", "0"]),
    (["pool", "create", "pool", "--base", "x"], ["pool"]),
    (["pool", "create", "data.jsonl", "--base", "x"], ["data.jsonl", "a file"]),
    (["pool", "create", "data.jsonl/new", "--base", "x"], ["data.jsonl", "File exists"]),
    (["pool", "create", "new", "--base", ""], ["new", "base model"]),
    (["pool", "add", "nowhere", "e0"], ["nowhere is not a pool", "phatgoose pool create"]),
    (["pool", "add", "pool", "nowhere"], ["nowhere", "no such folder"]),
    (["pool", "add", "pool", "e0"], ["'e0'", "--name"]),
    (["pool", "add", "pool", "of-t5"], ["tiny-t5", "tiny-llama"]),
    (["pool", "add", "pool", "bare", "--name", "../x"], ["'../x'", "--name"]),
    (["pool", "add", "pool", "bare", "--link"], ["--link", "OWNER/NAME"]),
    (["pool", "add", "pool", "bare", "--revision", "main"], ["--revision", "OWNER/NAME"]),
    (["pool", "add", "pool", "owner/name"], ["'owner/name'", "HF_HUB_OFFLINE"]),
    (["pool", "remove", "pool", "e9"], ["'e9'", "e0, e1"]),
    (["pool", "list", "data.jsonl"], ["data.jsonl is not a pool", "a file"]),
    (["pool", "check", "damaged"], ["'e1'", "gate.safetensors"]),
    (["pool", "check", "pool", "--base", "nowhere"], ["'nowhere'"]),
    (["pool", "push", "pool", "owner/name"], ["'owner/name'", "HF_HUB_OFFLINE"]),
    (["pool", "push", "damaged", "owner/name"], ["'e1'", "gate.safetensors"]),
    (["pool", "pull", "owner/name", "new"], ["'owner/name'", "HF_HUB_OFFLINE"]),
    (["pool", "pull", "owner/name", "pool"], ["pool"]),
    (["pool", "import-official", "none.pt", *IMPORT[3:]], ["none.pt"]),
    (["pool", "import-official", "data.jsonl", *IMPORT[3:]], ["data.jsonl"]),
    ([*IMPORT, "--base", "tiny-t5"], ["expert-00", "decoder.block.0"]),
    ([*IMPORT, "--names", "a,b"], ["2 names", "5 different names"]),
    ([*IMPORT, "--names", "a,b,c,d,../e"], ["'../e'"]),
    ([*IMPORT, "--out", "pool"], ["pool"]),
    ([*ASK, "--pool", "nowhere"], ["nowhere is not a pool"]),
    ([*ASK, "--pool", "empty"], ["empty is empty", "phatgoose pool add"]),
    ([*ASK, "--pool", "gateless"], ["bare", "phatgoose gate"]),
    ([*ASK, "--pool", "damaged"], ["damaged/experts/e1"]),
    ([*ASK, "--base", "tiny-t5"], ["tiny-t5", "tiny-llama"]),
    ([*ASK, "--base", "thin/tiny-llama"], ["lacks weights"]),
    ([*ASK, "--router", "roulette"], ["'roulette'", "phatgoose"]),
    ([*ASK, "--top-k", "0"], ["top_k"]),
    ([*ASK, "--top-k", "3"], ["top_k 3", "e0, e1", "--top-k 2"]),
    ([*ASK, "--max-new-tokens", "0"], ["max_new_tokens"]),
    ([*ASK, "--num-beams", "0"], ["num_beams"]),
    ([*ASK, "--seed", str(2**32)], ["seed"]),
    ([*ASK, "--device", "toaster"], ["'toaster'"]),
    (["route", *ASK[1:], "--html", "pool"], ["pool is a folder"]),
    (["route", *ASK[1:], "--html", "data.jsonl/page.html"], ["data.jsonl is a file"]),
    (["route", *ASK[1:], "--max-new-tokens", "0"], ["max_new_tokens"]),
    (["demo", "--pool", "nowhere"], ["nowhere is not a pool"]),
    (["demo", "--pool", "pool", "--html", "pool"], ["pool is a folder"]),
]


@pytest.mark.parametrize(("args", "words"), ERRORS, ids=lambda value: " ".join(value)[:90])
def test_user_errors(args: list[str], words: list[str], here: Path) -> None:
    before = tree(here), files_of(here)
    code, out, err = run(*args)
    assert code == 2
    # the demo says what it is about to do
    assert out == "" or args[0] == "demo"
    assert err.count("error: ") == 1
    message = err[err.index("error: ") :]
    for word in words:
        assert word in message
    assert "Traceback" not in err
    assert (tree(here), files_of(here)) == before


def tree(folder: Path) -> list[str]:
    """Folders too."""
    return sorted(str(path) for path in folder.rglob("*") if path.name != ".lock")


@pytest.mark.parametrize("what", ["adapter", "gate"])
def test_a_run_that_diverges_leaves_nothing(what: str, here: Path) -> None:
    """Not even the checkpoints, which another learning rate could not use."""
    if what == "gate":  # nothing that a gate's own steps do overflows, but the adapter may
        file = Path("bare/adapter_model.safetensors")
        save_file({key: 1e30 * t for key, t in load_file(file).items()}, file)
    before = files_of(here)
    rate = ("--learning-rate", "1e30", "--steps", 4, "--batch-size", 2)
    code, _, err = run(*(TRAIN if what == "adapter" else GATE), *rate)
    assert code == 2
    assert "not finite after 4 steps" in err
    assert "--learning-rate" in err
    assert files_of(here) == before


def test_errors_of_ours_keep_their_traceback(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user can mend is told in a message."""

    def bug(*_: Any) -> None:
        raise FileNotFoundError(2, "No such file or directory", "nothing of the user's")

    monkeypatch.setattr(Pool, "open", bug)
    monkeypatch.setattr(sys, "argv", ["phatgoose", "pool", "list", "pool"])
    with pytest.raises(FileNotFoundError):
        main()
