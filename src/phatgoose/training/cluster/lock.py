"""A lock that keeps two processes, on any machines, from training the same group."""

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
    """Hold the lock file `path`; wait for it while its holder makes progress.

    A cluster that cannot reach a machine declares its processes dead and restarts
    their tasks elsewhere, but the processes may still run. As long as one of them
    trains a group, the new one waits; then it finds the group finished, or resumes
    from the last checkpoint. The operating system frees the lock of a dead process.

    The file is never deleted: a process would keep waiting for the deleted file while
    another creates a new one.

    Args:
        path: lock file, in a folder that all machines share.
        checkpoints: files that the holder of the lock writes from time to time.
        timeout_s: seconds to wait while none of them changes.
        log: file that says which process holds the lock; for the error.

    Raises:
        ClusterError: another process holds the lock and makes no progress.
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
                    expected="a process that makes progress, or ends",
                    fix=f"end it ({log} says where it runs), and repeat the command",
                ) from error
    try:
        yield
    finally:
        lock.release()


def _state(files: Sequence[Path]) -> list[int | None]:
    """When each file was last changed; None for a missing file."""
    return [_changed(file) for file in files]


def _changed(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except FileNotFoundError:
        return None
