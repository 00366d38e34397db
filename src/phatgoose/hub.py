"""Pools and experts on the Hugging Face Hub, through huggingface_hub.

A pool's repository holds what its folder holds: pool.json and the files that it
names. $HF_ENDPOINT, $HF_HOME, $HF_TOKEN and $HF_HUB_OFFLINE act as everywhere.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub import errors as hf

from phatgoose.errors import HubError, PhatgooseError
from phatgoose.expert import FILES
from phatgoose.files import new_folder
from phatgoose.manifest import EXPERTS, MANIFEST_FILE, Entry
from phatgoose.pool import Pool, check_new_folder

# what each error means: its class, what was expected, and what mends it
_REMEDIES: tuple[tuple[type[Exception], str, str], ...] = (
    (hf.HFValidationError, "the name of a hub repository", "give it as OWNER/NAME"),
    (hf.GatedRepoError, "a repository that you may read", "ask for access on its page, then: hf auth login"),
    (hf.RepositoryNotFoundError, "a model repository", "check its name; if it is private: hf auth login"),
    (hf.RevisionNotFoundError, "a branch, a tag or a commit of it", "give another --revision, or none"),
    (hf.RemoteEntryNotFoundError, "a repository that `phatgoose pool push` made", "check its name"),
    (hf.OfflineModeIsEnabled, "no HF_HUB_OFFLINE, or files that are in the cache", "unset HF_HUB_OFFLINE"),
)
# of httpx or, since version 2 of huggingface_hub, of httpx2; failed connections are of this class
_HTTPError: type[Exception] = hf.HTTPError  # type: ignore[attr-defined]


def push_pool(pool: Pool, repo: str, *, private: bool = False, message: str | None = None) -> str:
    """Make a hub repository hold exactly this pool, in one commit.

    Experts that stay on the hub are pushed as what they are, lines of pool.json.
    Files of the repository outside experts/, such as a README.md, are kept.

    Args:
        pool: the pool, or a subset of one.
        repo: OWNER/NAME; made if there is none.
        private: whether a new repository is private (an existing one stays as it is).
        message: of the commit.

    Returns:
        The commit's sha (the present one if nothing has changed).

    Raises:
        PhatgooseError: the first problem that `Pool.check` finds; nothing is pushed.
        HubError: the hub refused or did not answer; the repository is as it was (a new one is empty).
    """
    for problem in pool.check():
        raise problem
    files = {path: pool.folder / path for path in _expert_files(pool)}
    with tempfile.TemporaryDirectory() as scratch, _hub_errors(repo):
        # written anew because a subset's manifest differs from the one in its folder
        pool.manifest.write(Path(scratch))
        files[MANIFEST_FILE] = Path(scratch) / MANIFEST_FILE
        api = HfApi()
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        info = api.model_info(repo)
        present = [file.rfilename for file in info.siblings or ()]
        gone = [path for path in present if path.startswith(f"{EXPERTS}/") and path not in files]
        # upload_folder may split its work into several commits, and a pull between two of them would fail
        changes = [CommitOperationAdd(path, file) for path, file in files.items()]
        message = message or f"Push a pool of {len(pool)} experts"
        deletions = [CommitOperationDelete(path) for path in gone]
        return api.create_commit(repo, changes + deletions, commit_message=message, parent_commit=info.sha).oid


def pull_pool(repo: str, out: str | Path, revision: str | None = None) -> Pool:
    """Download a pool. Only pool.json and the files that it names are fetched.

    Args:
        repo: OWNER/NAME.
        out: folder of the pool; must not exist, or be empty.
        revision: branch, tag or commit; the main branch if None.

    Returns:
        The pool, every file checked against the manifest's sha256.

    Raises:
        PoolError: `out` is not empty.
        HubError: no such repository, no pool in it, a damaged one, or no
            connection; `out` is as it was.
    """
    out = Path(out)
    check_new_folder(out)
    commit = resolve_revision(repo, revision)
    with new_folder(out) as temporary:
        with _hub_errors(repo):
            HfApi().hf_hub_download(repo, MANIFEST_FILE, revision=commit, local_dir=temporary)
        _pull_experts(repo, commit, temporary)
        shutil.rmtree(temporary / ".cache", ignore_errors=True)  # huggingface_hub's notes for a resumed download
    return Pool.open(out)


def download_expert(repo: str, revision: str | None) -> Path:
    """Download an expert into the hub's cache, or find it there.

    Args:
        repo: OWNER/NAME of a PEFT adapter, with or without a gate.
        revision: branch, tag or commit; the main branch if None. A commit that
            is in the cache needs no connection.

    Returns:
        Its folder in the cache, holding those of an expert's four files that
        the repository has (never a pickle).

    Raises:
        HubError: no such repository or revision, or no connection.
    """
    with _hub_errors(repo):
        return Path(HfApi().snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))


def resolve_revision(repo: str, revision: str | None = None) -> str:
    """The commit (40 hex digits) that a branch or tag, or the main branch, stands at.

    Raises:
        HubError: no such repository or revision, or no connection.
    """
    with _hub_errors(repo):
        commit = HfApi().model_info(repo, revision=revision).sha
    assert commit is not None  # the hub always tells it
    return commit


def add_from_hub(pool: Pool, repo: str, name: str | None = None, revision: str | None = None) -> Entry:
    """Copy an expert from the hub into a pool; `Pool.link` adds one that stays there.

    Args:
        pool: the pool to change.
        repo: OWNER/NAME of a PEFT adapter, with or without a gate.
        name: in the pool; the last part of `repo` if None.
        revision: branch, tag or commit; the main branch if None.

    Raises:
        HubError: it cannot be downloaded.
        PoolError, AdapterError, GateError: see `Pool.add`.
    """
    commit = resolve_revision(repo, revision)
    folder = download_expert(repo, commit)
    hub = {"repo": repo, "revision": commit}
    return pool.add(folder, name if name is not None else repo.split("/")[-1], source=f"{repo}@{commit}", hub=hub)


def _expert_files(pool: Pool) -> list[str]:
    entries = [entry for entry in pool.entries if entry.path is not None]
    # a pool from a stranger may name anything; what is no expert's file is neither sent nor fetched
    return [f"{entry.path}/{name}" for entry in entries for name in entry.files if name in FILES]


def _pull_experts(repo: str, commit: str, folder: Path) -> None:
    try:
        pool = Pool.open(folder)
        patterns = [MANIFEST_FILE, *(glob.escape(path) for path in _expert_files(pool))]
        with _hub_errors(repo):
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


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    # a failed upload is a RuntimeError, a strange answer a ValueError
    except (_HTTPError, hf.EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise _hub_error(repo, error) from error


def _hub_error(repo: str, error: Exception) -> HubError:
    if isinstance(error.__cause__, (hf.HfHubHTTPError, hf.OfflineModeIsEnabled)):
        error = error.__cause__  # "not in the cache" and "upload failed" hide what the hub said
    expected, fix = f"success from {constants.ENDPOINT}", "check the connection and $HF_ENDPOINT, then try again"
    if isinstance(error, hf.HfHubHTTPError) and error.response.status_code in (401, 403):
        expected, fix = "a token that may do this", "hf auth login, with such a token"
    for kind, *remedy in _REMEDIES:
        if isinstance(error, kind):
            expected, fix = remedy
            break
    found = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    return HubError(f"cannot use hub repository {repo!r}", found=found, expected=expected, fix=fix)
