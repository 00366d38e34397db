"""Every command: what it prints, and what it leaves on disk."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import phatgoose
from helpers.checks import files_of
from helpers.cli import CHECKPOINT, PROMPT, SHORT, Result, make_workshop, run, succeed
from helpers.data import make_data
from helpers.golden import GOLDEN
from helpers.models import t5
from helpers.pools import make_pool
from phatgoose.cli import app
from phatgoose.experts.adapter import WEIGHTS_FILE
from phatgoose.experts.official import import_official
from phatgoose.experts.pool import Pool
from phatgoose.files import sha256


def process(*command: object) -> Result:
    """A command in a process of its own."""
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, check=False)
    return Result(found.returncode, found.stdout, found.stderr)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_workshop(tmp_path_factory.mktemp("template"))


@pytest.fixture
def here(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workshop of its own for each test, and the present folder."""
    monkeypatch.chdir(shutil.copytree(template, tmp_path / "here"))
    return tmp_path / "here"


def cells(out: str) -> list[list[str]]:
    """The rows of a printed table."""
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in out.splitlines() if line.startswith("│")]


# --- ways in ----------------------------------------------------------------------------------

SCRIPT = (Path(sys.executable).with_name("phatgoose"),)
MODULE = (sys.executable, "-m", "phatgoose")


def test_the_command_line_imports_nothing_heavy() -> None:
    heavy = ("torch", "transformers", "peft", "datasets", "safetensors", "huggingface_hub", "numpy")
    code = f"import sys, phatgoose.cli; print([name for name in {heavy} if name in sys.modules])"
    assert process(sys.executable, "-c", code) == Result(0, "[]\n", "")


@pytest.mark.parametrize("way", [SCRIPT, MODULE], ids=["script", "module"])
def test_both_ways_in(way: tuple[object, ...]) -> None:
    assert process(*way, "--version") == Result(0, phatgoose.__version__ + "\n", "")
    code, out, err = process(*way, "--nonsense")
    assert (code, out) == (2, "")
    assert "No such option" in err


@pytest.mark.slow
def test_a_process_answers_a_prompt(here: Path) -> None:
    """Nothing but the answer is printed, so that it can be used in a pipe."""
    code, out, _ = process(*MODULE, "generate", PROMPT, "--pool", "pool", *SHORT)
    assert code == 0
    assert out == succeed("generate", PROMPT, "--pool", "pool", *SHORT)
    assert all(word.strip("<>").isdigit() for word in out.split())


def test_a_process_fails(here: Path) -> None:
    code, out, err = process(*SCRIPT, "pool", "list", "nowhere")
    assert (code, out) == (2, "")
    assert err.startswith("error: nowhere is not a pool\n  found: no such folder\n")
    assert "Traceback" not in err


def commands(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name)


COMMANDS = list(commands(typer.main.get_command(app)))


def test_help_names_every_command() -> None:
    out = succeed("--help") + succeed("pool", "--help")
    assert len(COMMANDS) >= 13
    for command in COMMANDS:
        assert command[-1] in out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_and_options_of(command: tuple[str, ...]) -> None:
    assert "Usage: phatgoose " + " ".join(command) in succeed(*command, "--help")
    code, out, err = run(*command, "--nonsense")
    assert (code, out) == (2, "")
    assert "usage" in err.lower()  # lm-eval's own says it small
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["nonsense"], "nonsense"),
        (["pool", "nonsense"], "nonsense"),
        (["generate"], "text"),
        (["generate", "x"], "--pool"),
        (["pool", "create", "new"], "--base"),
        (["train", "data.jsonl", "--base", "tiny-llama"], "--out"),
        (["gate", "bare", "--data", "data.jsonl", "--steps", "many"], "'--steps'"),
        (["generate", "x", "--pool", "pool", "--dtype", "fp8"], "fp8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_usage_errors(args: list[str], word: str, here: Path) -> None:
    before = files_of(here)
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    assert word in err
    assert "Usage" in err
    assert files_of(here) == before


def test_no_command_shows_the_help() -> None:
    assert "Usage: phatgoose" in run().out
    assert "import-official" in run("pool").out


# --- the whole way ----------------------------------------------------------------------------


@pytest.mark.parametrize("base", ["tiny-llama", pytest.param("tiny-t5", marks=pytest.mark.slow)])
def test_from_data_to_a_routed_answer(base: str, here: Path) -> None:
    quick = ("--steps", 2, "--batch-size", 2)
    for i, name in enumerate(("one", "two")):
        data = make_data(here / f"{name}.jsonl", seed=i)
        options = ("--base", base, "--rank", 2, "--validation-split", "validation", "--save-dtype", "bf16")
        out = succeed("train", data, "--out", name, *options, *quick)
        assert out.endswith(f"adapter: {name}\nnext: phatgoose gate {name} --data {data}\n")
        assert succeed("gate", name, "--data", data, *quick).endswith(f"gate: {name}/gate.safetensors\n")
    assert succeed("pool", "create", "mine", "--base", base) == "pool: mine\nnext: phatgoose pool add mine ADAPTER\n"
    assert succeed("pool", "add", "mine", "one") == "added one; the pool has 1 experts\n"
    assert succeed("pool", "add", "mine", "two", "--name", "second") == "added second; the pool has 2 experts\n"
    assert succeed("pool", "check", "mine", "--base", base) == "2 experts, all well\n"

    answer = succeed("generate", PROMPT, "--pool", "mine", *SHORT)
    routing = json.loads(succeed("route", PROMPT, "--pool", "mine", *SHORT, "--json"))
    assert routing["answer"] + "\n" == answer
    assert routing["experts"] == ["one", "second"]
    assert routing["tokens"][:3] == ["<5>", "<6>", "<7>"]
    assert sum(routing["shares"]["text"].values()) == pytest.approx(1, abs=2e-3)

    assert succeed("pool", "remove", "mine", "one") == "removed one; the pool has 1 experts\n"
    assert Pool.open("mine").names == ("second",)
    leftovers = {"one.training", "two.training", "one.gating", "two.gating"}
    assert not leftovers & {path.name for path in here.iterdir()}


# --- pools ------------------------------------------------------------------------------------


def test_an_adapter_of_several_datasets(here: Path) -> None:
    """Their union, in the order given, as one file of all rows would be."""
    rows = (here / "data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (here / "a.jsonl").write_text("".join(rows[:5]), encoding="utf-8")
    (here / "b.jsonl").write_text("".join(rows[5:]), encoding="utf-8")
    settings = ("--base", here / "tiny-llama", "--steps", 2, "--rank", 2, "--device", "cpu")
    out = succeed("train", "a.jsonl", "b.jsonl", *settings, "--out", "multitask")
    assert "gate" not in out
    succeed("train", "data.jsonl", *settings, "--out", "one")
    assert sha256(here / "multitask" / WEIGHTS_FILE) == sha256(here / "one" / WEIGHTS_FILE)


def test_list(here: Path) -> None:
    out = succeed("pool", "list", "gateless")
    assert "gateless, for tiny-llama" in out
    assert cells(out) == [
        ["0", "e0", "yes", "8", "14", "e0"],
        ["1", "e1", "yes", "8", "14", "e1"],
        ["2", "bare", "no", "8", "14", "bare"],
    ]
    listed = json.loads(succeed("pool", "list", "gateless", "--json"))
    assert listed["base"] == "tiny-llama"
    assert [(row["id"], row["name"], row["gate"]) for row in listed["experts"]] == [
        (0, "e0", True),
        (1, "e1", True),
        (2, "bare", False),
    ]
    assert listed["experts"][2] | {"ranks": [8], "sites": 14, "source": "bare"} == listed["experts"][2]
    assert json.loads(succeed("pool", "list", "empty", "--json"))["experts"] == []


def test_list_shows_odd_names_whole(here: Path) -> None:
    long = "an-expert-with-a-name-that-is-longer-than-a-narrow-terminal-has-columns-for-it"
    shutil.copytree("e0", "v2[bold]")
    Pool.open("empty").add(here / "v2[bold]", long)
    out = succeed("pool", "list", "empty")
    assert "".join(row[1] for row in cells(out)) == long
    assert "".join(row[5] for row in cells(out)) == "v2[bold]"


def test_check(here: Path) -> None:
    assert succeed("pool", "check", "gateless") == "3 experts, all well; without a gate: bare\n"
    assert succeed("pool", "check", "pool", "--base", "tiny-llama") == "2 experts, all well\n"
    Path("damaged/experts/e0/adapter_model.safetensors").unlink()
    code, out, err = run("pool", "check", "damaged")
    assert (code, out) == (2, "")
    assert [line for line in err.splitlines() if line.startswith("error: ")] == [
        "error: expert 'e0': adapter_model.safetensors is not the file that was added",
        "error: expert 'e1': gate.safetensors is not the file that was added",
    ]


def test_a_gate_inside_a_pool(here: Path) -> None:
    expert = Path("gateless/experts/bare")
    assert run("generate", PROMPT, "--pool", "gateless").code == 2
    succeed("gate", expert, "--data", "data.jsonl", "--steps", 2, "--batch-size", 2)
    pool = Pool.open("gateless")
    assert pool.names == ("e0", "e1", "bare")
    assert pool.check() == []
    assert pool.entry("bare").source == "bare (adapter only)"
    assert pool.expert("bare").has_gate
    assert not Path("bare/gate.safetensors").exists()
    assert succeed("pool", "check", "gateless") == "3 experts, all well\n"
    succeed("generate", PROMPT, "--pool", "gateless", "--top-k", 3, *SHORT)


def test_import_official(here: Path) -> None:
    assert succeed("pool", "import-official", CHECKPOINT, "--base", GOLDEN / "base", "--out", "made/pool") == (
        "pool: made/pool, 5 experts\n"
    )
    assert [path.name for path in Path("made").iterdir()] == ["pool"]
    pool = Pool.open("made/pool")
    assert pool.names == tuple(f"expert-{i:02d}" for i in range(5))
    assert pool.check() == []
    names = "a,b,c,d,e"
    succeed("pool", "import-official", CHECKPOINT, "--base", GOLDEN / "base", "--out", "named", "--names", names)
    assert Pool.open("named").names == tuple(names.split(","))
    assert {entry.source for entry in Pool.open("named").entries} == {"official_checkpoint.pt"}


def test_a_failed_import_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at the last expert."""
    from phatgoose.models import base

    add, model = Pool.add, base.empty_base(str(GOLDEN / "base"))
    before = files_of(here)

    def full_disk(self: Pool, *args: Any, **options: Any) -> Any:
        if len(self) == 4:
            raise OSError(28, "No space left on device")
        return add(self, *args, **options)

    monkeypatch.setattr(Pool, "add", full_disk)
    with pytest.raises(OSError, match="No space left"):
        import_official(CHECKPOINT, model, "base", here / "new")
    assert files_of(here) == before
    assert not (here / "new").exists()


# --- generate, route, demo --------------------------------------------------------------------


def test_ways_to_generate(here: Path) -> None:
    ask = ("generate", PROMPT, "--pool", "pool", "--max-new-tokens", 8)
    greedy = succeed(*ask)
    assert succeed(*ask) == greedy
    assert succeed(*ask, "--base", here / "tiny-llama", "--device", "cpu", "--dtype", "fp32") == greedy
    assert succeed(*ask, "--sample", "--seed", 3) == succeed(*ask, "--sample", "--seed", 3)
    assert len({succeed(*ask, "--sample", "--seed", seed) for seed in range(4)}) > 1
    assert succeed(*ask, "--top-k", 1) != greedy
    assert succeed(*ask, "--separator", " <9>") != greedy
    succeed(*ask, "--num-beams", 3)
    succeed(*ask, "--dtype", "bf16")


def test_routers_and_their_options(here: Path) -> None:
    ask = ("generate", PROMPT, "--pool", "pool", "--max-new-tokens", 8)
    greedy = succeed(*ask)
    alone = succeed(*ask, "--router", "single", "--expert", "e1")
    assert alone == succeed(*ask, "--router", "single", "--expert", "e1", "--top-k", 1) != greedy
    assert succeed(*ask, "--router", "phatgoose-prior", "--option", "prior_strength=0") == greedy
    assert succeed(*ask, "--option", "top_k=1") == succeed(*ask, "--top-k", 1)
    routing = json.loads(succeed("route", PROMPT, "--pool", "pool", *SHORT, "--json", "--router", "uniform"))
    assert routing["shares"]["text"] == {"e0": 0.5, "e1": 0.5}


def test_route(here: Path) -> None:
    out = succeed("route", PROMPT, "--pool", "pool", *SHORT)
    answer = succeed("generate", PROMPT, "--pool", "pool", *SHORT)
    assert out.splitlines()[-1] == "answer: " + answer.strip()
    rows = cells(out)
    routing = json.loads(succeed("route", PROMPT, "--pool", "pool", *SHORT, "--json"))
    assert [row[0] for row in rows] == [repr(token) for token in routing["tokens"]]
    assert [row[1] for row in rows[:-1]] == [leading["expert"] for leading in routing["leading"][:-1]]
    assert rows[-1][1:] == ["-", "", "", ""]  # the last token is never read


def test_route_shows_tokens_as_they_are(here: Path) -> None:
    """Tokens in brackets are no markup of the table."""
    tokenizer = Path("tiny-llama/tokenizer.json")
    tokenizer.write_text(tokenizer.read_text().replace('"<5>"', '"[/INST]"').replace('"<6>"', '"[bold]"'))
    out = succeed("route", "[/INST] [bold] <7>", "--pool", "pool", *SHORT)
    assert "'[/INST]'" in out
    assert "'[bold]'" in out


def test_route_writes_a_page(here: Path) -> None:
    """The page's name goes to stderr: stdout is the JSON alone."""
    code, out, err = run("route", PROMPT, "--pool", "pool", *SHORT, "--json", "--html", "pages/new/page.html")
    assert code == 0
    assert json.loads(out)["experts"] == ["e0", "e1"]
    assert "page: pages/new/page.html" in err
    assert "&lt;5&gt; &lt;6&gt; &lt;7&gt;" in Path("pages/new/page.html").read_text()


def test_route_with_experts_of_the_decoder_alone(here: Path) -> None:
    make_pool(t5, here / "decoders", target_modules=r"decoder\..*\.SelfAttention\.[qv]")
    ask = ("route", PROMPT, "--pool", "decoders/pool", *SHORT)
    routing = json.loads(succeed(*ask, "--json"))
    assert routing["token_shares"][:3] == [None] * 3
    assert routing["token_shares"][3] is not None
    assert routing["shares"]["prompt"] is None
    assert [row[1] for row in cells(succeed(*ask))[:3]] == ["-"] * 3


def test_demo(here: Path) -> None:
    out = succeed("demo", "--pool", "pool", "--html", "out/demo.html", "--max-new-tokens", 1)
    assert "base model tiny-llama; 2 experts: e0, e1" in out
    assert "routing per token and layer: out/demo.html" in out
    assert Path("out/demo.html").is_file()
