"""Files of a checkpoint: opened first, then checked by descriptor."""

from __future__ import annotations

import errno
import io
import os
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from warmserve_rt._errors import CorruptCheckpoint, WarmServeError

# O_NONBLOCK, because opening a FIFO would block.
_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_LEASE_SECONDS = 5.0  # how long to wait for another process to give up a lease on a file
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
}


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The properties of a file that must not change while a model uses it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """Return the current identity of the open file `fd`."""
        now = os.fstat(fd)
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointFile:
    """A safetensors file, held open so that replacing it on disk cannot change a model."""

    path: str  # decoded by os.fsdecode; see `shown`
    identity: FileIdentity  # when the header was read
    metadata: Mapping[str, str]  # the header's __metadata__
    _file: io.BufferedReader = field(repr=False)

    @property
    def fd(self) -> int:
        """The descriptor, owned by this object. Raises WarmServeError after `close`."""
        if self._file.closed:
            raise WarmServeError(f"{shown(self.path)} was closed")
        return self._file.fileno()

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def shown(path: str) -> str:
    """Return a path as one printable line of text, whatever its bytes are."""
    return "".join(char if char.isprintable() else _escape(char) for char in path)


def _escape(char: str) -> str:
    if 0xDC80 <= ord(char) <= 0xDCFF:  # a byte that is not UTF-8, kept by os.fsdecode
        return f"\\x{ord(char) - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()


@contextmanager
def blaming(path: str) -> Iterator[None]:
    """Turn a ValueError into a CorruptCheckpoint that names the file."""
    try:
        yield
    except ValueError as error:
        what = str(error)[:1000]  # names may be huge
        raise CorruptCheckpoint(f"{shown(path)}: {what}") from error


def open_path(path: str, *, folder: int | None = None, follow: bool = True) -> int:
    """Open a regular file or a directory, relative to the descriptor `folder` if it is given.

    Waits up to 5 seconds for another process that has a lease on the file (fcntl, F_SETLEASE).
    Raises ValueError, which names the kind, for other kinds of files, and OSError.
    """
    _judge(os.stat(path, dir_fd=folder, follow_symlinks=follow).st_mode, link=not follow)
    flags = _FLAGS if follow else _FLAGS | os.O_NOFOLLOW
    until = time.monotonic() + _LEASE_SECONDS
    while True:
        try:
            fd = os.open(path, flags, dir_fd=folder)
            break
        except BlockingIOError as error:
            if time.monotonic() >= until:
                why = "another process has a lease on this file (fcntl F_SETLEASE) and keeps it"
                raise BlockingIOError(error.errno, why, path) from error
            time.sleep(0.01)
    try:
        _judge(os.fstat(fd).st_mode)  # the name may lead to another file than stat() saw
    except BaseException:
        os.close(fd)
        raise
    return fd


def _judge(mode: int, *, link: bool = False) -> None:
    kind = stat.S_IFMT(mode)
    if kind not in (stat.S_IFREG, stat.S_IFDIR) and not (link and kind == stat.S_IFLNK):
        raise ValueError(f"not a regular file but {_KINDS.get(kind, 'of an unknown kind')}")


def is_directory(fd: int) -> bool:
    """Return whether a descriptor is a directory's."""
    return stat.S_ISDIR(os.fstat(fd).st_mode)


def reader(fd: int) -> io.BufferedReader:
    """Return a reader that owns the descriptor. Raises ValueError if it is a directory's."""
    try:
        if is_directory(fd):
            raise ValueError("not a regular file but a directory")
        os.set_blocking(fd, True)  # because io_uring would fail with EAGAIN instead of waiting
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Give an OSError the whole path, and name the limit if the process has no descriptors left."""
    try:
        yield
    except OSError as error:
        why = error.strerror
        if error.errno == errno.EMFILE:
            why = f"{why}: each file of a model needs a descriptor (see `ulimit -n`)"
        raise OSError(error.errno, why, path) from error
