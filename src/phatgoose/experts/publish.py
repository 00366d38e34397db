"""Pools on the Hugging Face Hub: push, pull, and add an expert from it.

A pool's repository has the layout of its folder: pool.json, and the files that
pool.json names.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

from phatgoose.errors import HubError, PhatgooseError
from phatgoose.experts.checks import check_new_folder
from phatgoose.experts.expert import FILES
from phatgoose.experts.hub import download_expert, hub_errors, resolve_revision
from phatgoose.experts.manifest import EXPERTS, MANIFEST_FILE, Entry
from phatgoose.experts.pool import Pool
from phatgoose.files import new_folder


def push_pool(pool: Pool, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Make a hub repository hold exactly this pool, in one commit.

    A linked expert is pushed as its entry in pool.json alone. Files of the
    repository outside experts/, such as a README.md, are kept.

    Args:
        pool: the pool, or a subset of one.
        repo: OWNER/NAME of the repository; created if it does not exist.
        private: make a new repository private; an existing one keeps its visibility.
        message: commit message.

    Returns:
        Sha of the commit, or of the current one if nothing changed.

    Raises:
        PhatgooseError: `Pool.check` finds a problem (the first is raised); nothing is pushed.
        HubError: the hub refused or did not answer; the repository is unchanged (a new one is empty).
    """
    for problem in pool.check():
        raise problem
    files = {path: pool.folder / path for path in _expert_files(pool)}
    with tempfile.TemporaryDirectory() as scratch, hub_errors(repo):
        # a subset's manifest differs from the one in its folder
        pool.manifest.write(Path(scratch))
        files[MANIFEST_FILE] = Path(scratch) / MANIFEST_FILE
        api = HfApi()
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        info = api.model_info(repo)
        present = [file.rfilename for file in info.siblings or ()]
        gone = [path for path in present if path.startswith(f"{EXPERTS}/") and path not in files]
        # upload_folder may make several commits, and a pull between two of them would fail
        changes = [CommitOperationAdd(path, file) for path, file in files.items()]
        message = message or f"Push a pool of {len(pool)} experts"
        deletions = [CommitOperationDelete(path) for path in gone]
        return api.create_commit(repo, changes + deletions, commit_message=message, parent_commit=info.sha).oid


def pull_pool(repo: str, out: str | Path, revision: str | None = None) -> Pool:
    """Download a pool. Only pool.json and the files that it names are fetched.

    Args:
        repo: OWNER/NAME of the pool's repository.
        out: folder of the pool; it must be empty or not exist.
        revision: branch, tag or commit; by default the main branch.

    Returns:
        The pool, with every file checked against its sha256 in the manifest.

    Raises:
        PoolError: `out` is not empty.
        HubError: the repository does not exist, holds no pool or a damaged one,
            or there is no connection; `out` is unchanged.
    """
    out = Path(out)
    check_new_folder(out)
    commit = resolve_revision(repo, revision)
    with new_folder(out) as temporary:
        with hub_errors(repo):
            HfApi().hf_hub_download(repo, MANIFEST_FILE, revision=commit, local_dir=temporary)
        _pull_experts(repo, commit, temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # huggingface_hub's bookkeeping
    return Pool.open(out)


def add_from_hub(pool: Pool, repo: str, name: str | None = None, revision: str | None = None) -> Entry:
    """Copy an expert from the hub into a pool. `Pool.link` adds one without copying it.

    Args:
        pool: the pool to change.
        repo: OWNER/NAME of a PEFT adapter, with or without a gate.
        name: the expert's name in the pool; by default NAME of the repository.
        revision: branch, tag or commit; by default the main branch.

    Raises:
        HubError: the download failed.
        PoolError, AdapterError, GateError, PrototypeError: see `Pool.add`.
    """
    commit = resolve_revision(repo, revision)
    folder = download_expert(repo, commit)
    hub = {"repo": repo, "revision": commit}
    return pool.add(folder, name if name is not None else repo.split("/")[-1], source=f"{repo}@{commit}", hub=hub)


def _expert_files(pool: Pool) -> list[str]:
    entries = [entry for entry in pool.entries if entry.path is not None]
    # a stranger's pool may name any file; only an expert's files are sent and fetched
    return [f"{entry.path}/{name}" for entry in entries for name in entry.files if name in FILES]


def _pull_experts(repo: str, commit: str, folder: Path) -> None:
    try:
        pool = Pool.open(folder)
        patterns = [MANIFEST_FILE, *(glob.escape(path) for path in _expert_files(pool))]
        with hub_errors(repo):
            HfApi().snapshot_download(repo, revision=commit, local_dir=folder, allow_patterns=patterns)
        for problem in pool.check():
            raise problem
    except HubError:
        raise
    except PhatgooseError as error:
        raise HubError(
            f"the pool in {repo} is damaged: {error.what.replace(str(folder), repo)}",
            found=error.found,
            expected=error.expected,
            fix=f"ask its owner to push it again, or pull an older commit than {commit[:12]} with --revision",
        ) from error
