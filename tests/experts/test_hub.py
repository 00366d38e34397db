"""Pools on the hub, against a hub in memory (helpers/hub_server.py).

huggingface_hub reads $HF_ENDPOINT when it is imported, so everything that talks
to the hub runs in a process of its own, which is started with the variable set.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from helpers.checks import files_of
from helpers.hub_server import HubServer, Repo
from helpers.models import llama
from helpers.pools import make_adapter, make_expert, make_gate, make_pool
from phatgoose.config import RouterConfig
from phatgoose.errors import AdapterError, HubError, PhatgooseError, PoolError, RouterError
from phatgoose.experts import publish as hub
from phatgoose.experts.location import editing
from phatgoose.experts.manifest import Entry
from phatgoose.experts.pool import Pool
from phatgoose.routers import check_pool

TOKEN = "hf_test"
WEIGHTS = "adapter_model.safetensors"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    server = HubServer(TOKEN)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def run(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Calls a function in the process that has the hub."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN": TOKEN,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            process.submit(int).result()  # starts the process, which keeps this environment

        def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return process.submit(function, *args, **kwargs).result()

        yield call


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    make_pool(llama, folder, 2)
    return folder


@pytest.fixture
def pool(original: Path, tmp_path: Path) -> Pool:
    """A pool of experts e0 and e1; its own copy for each test."""
    return Pool.open(shutil.copytree(original / "pool", tmp_path / "pool"))


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """The name of a repository that no other test uses."""
    return f"tester/{request.node.name.replace('[', '-').replace(']', '')}"


def put_expert(server: HubServer, repo: str, folder: Path, **more: bytes) -> str:
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    return server.put(repo, files | more)


def check_told(error: pytest.ExceptionInfo[HubError], *words: str) -> None:
    assert error.value.found and error.value.expected and error.value.fix
    for word in words:
        assert word in str(error.value)


def test_a_pulled_pool_is_the_pushed_one(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path) -> None:
    revision = run(hub.push_pool, pool, repo, message="first")
    assert server.repos[repo].head == revision
    assert server.repos[repo].messages[1:] == ["first"]
    assert not server.repos[repo].private
    # the weights went through LFS, the rest as plain files
    assert any(request.startswith("PUT /objects/") for request in server.requests)

    pulled = run(hub.pull_pool, repo, tmp_path / "new" / "pulled")
    assert pulled.folder == tmp_path / "new" / "pulled"
    assert files_of(pulled.folder) == files_of(pool.folder)
    assert pulled.fingerprint == pool.fingerprint
    assert pulled.check() == []
    assert [path.name for path in pulled.folder.parent.iterdir()] == ["pulled"]


def test_a_push_without_changes_makes_no_commit(server: HubServer, run: Run, pool: Pool, repo: str) -> None:
    first = run(hub.push_pool, pool, repo)
    assert run(hub.push_pool, pool, repo) == first
    assert len(server.repos[repo].messages) == 2


def test_a_removed_expert_leaves_the_repository(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path):
    run(hub.push_pool, pool, repo)
    assert f"experts/e0/{WEIGHTS}" in server.paths(repo)
    both = server.repos[repo].head
    pool.remove("e0")
    server.put(repo, {"README.md": b"about", "experts/stale/gate.safetensors": b"old"})
    run(hub.push_pool, pool, repo)
    assert not [path for path in server.paths(repo) if path.startswith(("experts/e0/", "experts/stale/"))]
    assert "README.md" in server.paths(repo)
    assert len(server.repos[repo].messages) == 4  # created, pushed, changed by somebody else, pushed: one commit each

    # an older revision is still there
    old = run(hub.pull_pool, repo, tmp_path / "old", revision=both)
    assert old.names == ("e0", "e1")
    assert old.check() == []
    assert run(hub.pull_pool, repo, tmp_path / "new").names == ("e1",)


def test_a_subset_is_pushed_as_a_pool_of_its_own(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path):
    run(hub.push_pool, pool.subset(["e1"]), repo)
    assert not [path for path in server.paths(repo) if path.startswith("experts/e0")]
    assert run(hub.pull_pool, repo, tmp_path / "pulled").names == ("e1",)


def test_only_what_the_manifest_names_travels(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path):
    (pool.folder / ".lock").touch()
    (pool.folder / "notes.txt").write_text("private")
    (pool.folder / "experts" / "e0" / "adapter_model.bin").write_bytes(b"a pickle")
    (pool.folder / "experts" / "e0" / ".gate.safetensors.x1").write_bytes(b"half a file")
    run(hub.push_pool, pool, repo)
    named = [f"{entry.path}/{name}" for entry in pool.entries for name in entry.files]
    assert server.paths(repo) == sorted([".gitattributes", "pool.json", *named])

    # a manifest from a stranger may name a pickle, or a file outside the pool: neither is fetched
    server.put(repo, {"pickle.bin": b"1", "experts/e0/evil.bin": b"2", "experts/e0/deep/gate.safetensors": b"3"})
    pulled = run(hub.pull_pool, repo, tmp_path / "pulled")
    assert sorted(files_of(pulled.folder)) == sorted(["pool.json", *named])
    manifest = json.loads(server.repos[repo].files["pool.json"].content)
    manifest["experts"][0]["files"]["evil.bin"] = "0" * 64
    server.put(repo, {"pool.json": json.dumps(manifest).encode()})
    with pytest.raises(HubError) as error:
        run(hub.pull_pool, repo, tmp_path / "evil")
    check_told(error, repo, "evil.bin", "no such file")
    assert not any("evil.bin" in request or "pickle.bin" in request for request in server.requests)


@pytest.mark.parametrize("path", [f"experts/e1/{WEIGHTS}", "experts/e0/gate_config.json", "pool.json"])
def test_a_damaged_download_leaves_nothing(
    server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path, path: str
) -> None:
    repo = f"tester/damaged-{Path(path).name}"
    run(hub.push_pool, pool, repo)
    content = bytearray(server.repos[repo].files[path].content)
    content[-3] ^= 1
    server.put(repo, {path: bytes(content)})
    with pytest.raises(HubError) as error:
        run(hub.pull_pool, repo, tmp_path / "out" / "pulled")
    check_told(error, repo, "damaged", "--revision")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_missing_file_is_told(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path) -> None:
    run(hub.push_pool, pool, repo)
    files = dict(server.repos[repo].files)
    del files[f"experts/e0/{WEIGHTS}"]
    server.repos[repo].commit(files, "delete")
    with pytest.raises(HubError) as error:
        run(hub.pull_pool, repo, tmp_path / "pulled")
    check_told(error, repo, "e0", WEIGHTS, "no such file")
    assert not (tmp_path / "pulled").exists()


def test_pull_keeps_what_is_there(run: Run, repo: str, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(PoolError, match="not empty"):
        run(hub.pull_pool, repo, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_push_refuses_a_damaged_pool(server: HubServer, run: Run, pool: Pool, repo: str) -> None:
    (pool.folder / "experts" / "e1" / WEIGHTS).write_bytes(b"cut short")
    with pytest.raises(PhatgooseError, match="e1"):
        run(hub.push_pool, pool, repo)
    assert repo not in server.repos


def test_an_unknown_repository_is_named(run: Run, pool: Pool, repo: str, tmp_path: Path) -> None:
    for call in (
        lambda: run(hub.pull_pool, repo, tmp_path / "pulled"),
        lambda: run(hub.download_expert, repo, None),
        lambda: run(hub.resolve_revision, repo),
        lambda: run(pool.link, repo),
        lambda: run(hub.add_from_hub, pool, repo),
    ):
        with pytest.raises(HubError) as error:
            call()
        check_told(error, repo, "hf auth login")
    assert not (tmp_path / "pulled").exists()
    assert Pool.open(pool.folder).names == ("e0", "e1")


def test_an_unknown_revision_is_named(server: HubServer, run: Run, repo: str) -> None:
    server.put(repo, {"a": b"a"})
    with pytest.raises(HubError) as error:
        run(hub.resolve_revision, repo, "v9")
    check_told(error, repo, "v9", "--revision")


def test_a_repository_without_a_pool_is_named(server: HubServer, run: Run, repo: str, tmp_path: Path) -> None:
    server.put(repo, {"README.md": b"no pool"})
    with pytest.raises(HubError) as error:
        run(hub.pull_pool, repo, tmp_path / "pulled")
    check_told(error, repo, "pool.json", "phatgoose pool push")
    assert list(tmp_path.iterdir()) == []


def test_an_impossible_name_is_told(run: Run, pool: Pool) -> None:
    with pytest.raises(HubError) as error:
        run(hub.push_pool, pool, "a/b/c")
    check_told(error, "a/b/c", "OWNER/NAME")


def test_a_token_that_may_not_write_is_told(
    server: HubServer, run: Run, pool: Pool, repo: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.repos[repo] = Repo()
    server.repos[repo].commit({}, "initial commit")
    monkeypatch.setattr(server, "token", "hf_another")
    with pytest.raises(HubError) as error:
        run(hub.push_pool, pool, repo)
    check_told(error, repo, "hf auth login")
    assert server.paths(repo) == []


def test_a_private_repository_needs_a_token(
    server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(hub.push_pool, pool, repo, private=True)
    assert server.repos[repo].private
    assert run(hub.pull_pool, repo, tmp_path / "pulled").names == pool.names
    monkeypatch.setattr(server, "token", "hf_another")
    with pytest.raises(HubError) as error:
        run(hub.pull_pool, repo, tmp_path / "again")
    check_told(error, repo, "hf auth login")


def test_a_hub_that_is_down_is_told(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path) -> None:
    with server.down():
        for call in (
            lambda: run(hub.push_pool, pool, repo),
            lambda: run(hub.pull_pool, repo, tmp_path / "pulled"),
            lambda: run(hub.download_expert, repo, None),
        ):
            with pytest.raises(HubError) as error:
                call()
            check_told(error, repo, server.url, "HF_ENDPOINT")
    assert not (tmp_path / "pulled").exists()


def test_linked_expert_stays_on_the_hub(
    server: HubServer, run: Run, pool: Pool, repo: str, original: Path, tmp_path: Path
) -> None:
    folder = make_expert(llama, tmp_path / "e2", seed=2)
    revision = put_expert(server, repo, folder, **{"adapter_model.bin": b"a pickle"})
    entry: Entry = run(pool.link, repo, "linked")
    assert (entry.path, entry.hub) == (None, {"repo": repo, "revision": revision})
    expected = {name: digest for name, digest in files_of(folder).items() if name != "README.md"}
    assert entry.files == expected

    pool = Pool.open(pool.folder)
    assert pool.names == ("e0", "e1", "linked")
    put_expert(server, repo, original / "e1")  # the pool stays at its commit
    assert run(pool.check) == []
    expert = run(pool.expert, "linked")
    assert expert.has_gate
    assert files_of(expert.folder) == expected
    with server.down():  # what is in the cache needs no hub
        assert run(pool.expert, "linked").folder == expert.folder

    # it travels with the pool as a line of the manifest
    run(hub.push_pool, pool, repo + "-pool")
    assert not [path for path in server.paths(repo + "-pool") if "linked" in path]
    pulled = run(hub.pull_pool, repo + "-pool", tmp_path / "pulled")
    assert pulled.fingerprint == pool.fingerprint


def give_gate(folder: Path, name: str) -> None:
    """Write a gate for an expert of a pool, as `phatgoose gate` does."""
    with editing(folder / "experts" / name) as expert:
        make_gate(expert.folder)


def test_an_edited_linked_expert_becomes_a_copy(
    server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path
) -> None:
    put_expert(server, repo, make_adapter(llama, tmp_path / "bare"))
    run(pool.link, repo, "bare")
    cached = run(Pool.open(pool.folder).expert, "bare").folder
    before = files_of(cached)
    run(give_gate, pool.folder, "bare")

    again = Pool.open(pool.folder)
    entry = again.entry("bare")
    assert (entry.path, entry.hub) == ("experts/bare", None)
    assert entry.source.endswith(" (adapter only)")
    assert again.expert("bare").has_gate
    assert again.check() == []
    assert files_of(cached) == before


def test_a_linked_expert_gets_no_gate_in_the_cache(
    server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path
) -> None:
    put_expert(server, repo, make_adapter(llama, tmp_path / "bare"))
    run(pool.link, repo, "bare")
    with pytest.raises(RouterError, match="needs a gate") as error:
        run(check_pool, Pool.open(pool.folder), RouterConfig())
    again = f"phatgoose gate {pool.folder / 'experts' / 'bare'} --data DATA"
    assert error.value.fix == f"phatgoose pool remove {pool.folder} bare, add it again without --link, then {again}"


def test_link_has_the_checks_of_add(
    server: HubServer, run: Run, pool: Pool, repo: str, original: Path, tmp_path: Path
) -> None:
    put_expert(server, repo, original / "e0")
    with pytest.raises(PoolError, match="already has an expert 'e0'"):
        run(pool.link, repo, "e0")

    config = json.loads((original / "e0" / "adapter_config.json").read_text())
    foreign = json.dumps(config | {"base_model_name_or_path": "tester/another-base"}).encode()
    put_expert(server, repo + "-foreign", original / "e0", **{"adapter_config.json": foreign})
    with pytest.raises(PoolError, match="made for another base model"):
        run(pool.link, repo + "-foreign")

    server.put(repo + "-pickle", {"adapter_config.json": json.dumps(config).encode(), "adapter_model.bin": b"pickle"})
    with pytest.raises(AdapterError, match=WEIGHTS):
        run(pool.link, repo + "-pickle")
    assert Pool.open(pool.folder).names == ("e0", "e1")


def test_add_from_hub_copies(server: HubServer, run: Run, pool: Pool, repo: str, tmp_path: Path) -> None:
    folder = make_expert(llama, tmp_path / "e2", seed=2)
    first = put_expert(server, repo, folder)
    put_expert(server, repo, make_expert(llama, tmp_path / "e3", seed=3))
    entry: Entry = run(hub.add_from_hub, pool, repo, revision=first)
    name = repo.split("/")[-1]
    assert entry.name == name
    assert entry.hub == {"repo": repo, "revision": first}
    assert entry.source == f"{repo}@{first}"
    pool = Pool.open(pool.folder)
    assert pool.check() == []
    copied = files_of(pool.expert(name).folder)
    assert copied == {name: digest for name, digest in files_of(folder).items() if name != "README.md"}
