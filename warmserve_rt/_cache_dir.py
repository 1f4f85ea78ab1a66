"""Locate this package's cache folder and lock files between processes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_dir() -> Path:
    """Return this package's folder in `$XDG_CACHE_HOME` or in `~/.cache`.

    Raises OSError if neither is known. A container's user, for example, may have no entry in
    /etc/passwd.
    """
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base) / "warmserve_rt"
    home = os.path.expanduser("~")
    if os.environ.get("HOME") == "" or not os.path.isabs(home):
        raise OSError(
            "the user has no home directory for a cache: set HOME or XDG_CACHE_HOME to an absolute "
            "path"
        )
    return Path(home) / ".cache" / "warmserve_rt"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file that excludes other processes.

    Blocks while another process holds it. The system releases the lock if this process dies. Raises
    OSError if the file cannot be created or the file system has no locks.
    """
    descriptor = acquire(path)
    try:
        yield
    finally:
        os.close(descriptor)


def acquire(path: Path, *, wait: bool = True) -> int:
    """Lock a file and return its descriptor; closing the descriptor releases the lock.

    Creates the file and its folder if they are missing. The holder may remove them: the next
    process creates them again.

    Parameters
    ----------
    path : Path
    wait : bool
        Block while another process holds the lock.

    Raises
    ------
    BlockingIOError
        Without ``wait``, another process holds the lock.
    OSError
        As for :func:`locked`.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except FileNotFoundError:  # the folder was removed after mkdir
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            if _is_at(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
