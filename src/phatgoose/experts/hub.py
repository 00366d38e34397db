"""Experts on the Hugging Face Hub, and the hub's errors as HubError.

huggingface_hub reads $HF_ENDPOINT, $HF_HOME, $HF_TOKEN and $HF_HUB_OFFLINE.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub import errors as hf

from phatgoose.errors import HubError
from phatgoose.experts.expert import FILES

# an error's class, what was expected, and the fix
_REMEDIES: tuple[tuple[type[Exception], str, str], ...] = (
    (hf.HFValidationError, "the name of a hub repository", "give it as OWNER/NAME"),
    (hf.GatedRepoError, "a repository that you may read", "ask for access on its page, then: hf auth login"),
    (hf.RepositoryNotFoundError, "a model repository", "check its name; if it is private: hf auth login"),
    (hf.RevisionNotFoundError, "a branch, a tag or a commit of it", "give another --revision, or none"),
    (hf.RemoteEntryNotFoundError, "a repository that `phatgoose pool push` made", "check its name"),
    (hf.OfflineModeIsEnabled, "no HF_HUB_OFFLINE, or files that are in the cache", "unset HF_HUB_OFFLINE"),
)
# the class of failed connections: httpx's or, since huggingface_hub 2, httpx2's
_HTTPError: type[Exception] = hf.HTTPError  # type: ignore[attr-defined]


def download_expert(repo: str, revision: str | None) -> Path:
    """Download an expert into the hub's cache unless it is already there.

    Args:
        repo: OWNER/NAME of a PEFT adapter, with or without a gate.
        revision: branch, tag or commit; by default the main branch. A cached
            commit needs no connection.

    Returns:
        The expert's folder in the cache. Of the repository's files it holds
        only those that belong to an expert (`expert.FILES`), so never a pickle.

    Raises:
        HubError: the repository or revision does not exist, or there is no connection.
    """
    with hub_errors(repo):
        return Path(HfApi().snapshot_download(repo, revision=revision, allow_patterns=list(FILES)))


def resolve_revision(repo: str, revision: str | None = None) -> str:
    """Commit (40 hex digits) that a branch or tag points to; by default the main branch.

    Raises:
        HubError: the repository or revision does not exist, or there is no connection.
    """
    with hub_errors(repo):
        commit = HfApi().model_info(repo, revision=revision).sha
    assert commit is not None  # the hub always sends it
    return commit


@contextmanager
def hub_errors(repo: str) -> Iterator[None]:
    """Turn what goes wrong with a hub repository into HubError."""
    try:
        yield
    # a failed upload raises RuntimeError, a malformed answer ValueError
    except (_HTTPError, hf.EntryNotFoundError, OSError, RuntimeError, ValueError) as error:
        raise _hub_error(repo, error) from error


def _hub_error(repo: str, error: Exception) -> HubError:
    if isinstance(error.__cause__, (hf.HfHubHTTPError, hf.OfflineModeIsEnabled)):
        error = error.__cause__  # "not in the cache" and "upload failed" hide the hub's own message
    expected, fix = f"success from {constants.ENDPOINT}", "check the connection and $HF_ENDPOINT, then try again"
    if isinstance(error, hf.HfHubHTTPError) and error.response.status_code in (401, 403):
        expected, fix = "a token that may do this", "hf auth login, with such a token"
    for kind, *remedy in _REMEDIES:
        if isinstance(error, kind):
            expected, fix = remedy
            break
    found = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    return HubError(f"cannot use hub repository {repo!r}", found=found, expected=expected, fix=fix)
