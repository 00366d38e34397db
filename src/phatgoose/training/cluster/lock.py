"""A lock that keeps two processes, on whatever machines, from training one group."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from phatgoose.errors import ClusterError

_POLL_S = 5.0


@contextmanager
def group_lock(path: Path, checkpoints: Sequence[Path], timeout_s: float, log: Path) -> Iterator[None]:
    """Hold the lock file `path`; wait for it as long as who holds it makes progress.

    A cluster that cannot reach a machine takes its processes for dead, and
    starts their jobs again elsewhere; but they may live on. While such a process
    trains a group, the new one waits: it then finds the group finished, or
    goes on from the last checkpoint. The system frees the lock of a dead process.

    The file stays: a waiting process would go on to wait for a deleted file, while another makes a new one.

    Args:
        path: lock file, in a folder that all machines share.
        checkpoints: files that whoever holds the lock writes now and then.
        timeout_s: seconds to wait while none of them changes.
        log: says who holds it; for the message.

    Raises:
        ClusterError: another process holds it, and makes no progress.
    """
    lock = FileLock(path)
    seen, since = _state(checkpoints), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=min(_POLL_S, timeout_s))
            break
        except Timeout as error:
            state = _state(checkpoints)
            if state != seen:
                seen, since = state, time.monotonic()
            elif time.monotonic() - since >= timeout_s:
                raise ClusterError(
                    f"another process holds {path}",
                    found=f"no checkpoint of it for {timeout_s:g} seconds",
                    expected="one that goes on, or ends",
                    fix=f"end it ({log} says where it runs), and give the command again",
                ) from error
    try:
        yield
    finally:
        lock.release()


def _state(files: Sequence[Path]) -> list[int | None]:
    """When each file was changed; None if it is not there."""
    return [_changed(file) for file in files]


def _changed(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
