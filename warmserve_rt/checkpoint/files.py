"""The files of a checkpoint: which they are, opened, and held to what they were."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from warmserve_rt._errors import CorruptCheckpoint, WarmServeError

from .header import LIMIT, parse_object, strings


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What must not change in a file while a model uses it."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, fd: int) -> FileIdentity:
        """The identity, now, of the file that `fd` has open."""
        now = os.fstat(fd)
        return cls(now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointFile:
    """A safetensors file, held open so that replacing it on disk cannot change a model."""

    path: str
    identity: FileIdentity  # when the header was read
    metadata: Mapping[str, str]  # the header's __metadata__
    _file: io.BufferedReader = field(repr=False)

    @property
    def fd(self) -> int:
        """The descriptor, which stays this object's. Raises WarmServeError after `close`."""
        if self._file.closed:
            raise WarmServeError(f"{self.path} was closed")
        return self._file.fileno()

    def close(self) -> None:
        """Close the file; more than once is harmless."""
        self._file.close()

    def __enter__(self) -> CheckpointFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def blaming(path: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise CorruptCheckpoint(f"{path}: {str(error)[:1000]}") from error  # names may be huge


def list_directory(directory: str, allow_symlinks: bool) -> tuple[list[str], dict[str, str]]:
    """The paths of a directory's files; and the path of each tensor, if there is an index."""
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    indexes = [name for name in names if name.endswith(".safetensors.index.json")]
    if "model.safetensors.index.json" in indexes:
        indexes = ["model.safetensors.index.json"]
    shards = [name for name in names if name.endswith(".safetensors")]
    with blaming(directory):
        if len(indexes) > 1:
            raise ValueError(f"which of these is the index? {', '.join(indexes)}")
        paths = [_path_inside(directory, name, allow_symlinks) for name in indexes or shards]
    if not paths:
        raise FileNotFoundError(f"{directory}: no *.safetensors in this directory")
    if not indexes:
        return paths, {}
    with blaming(paths[0]), open_regular(paths[0]) as file:
        index = parse_object(file.read(LIMIT + 1))  # one byte more than is accepted
        weight_map = strings("weight_map", index.get("weight_map"))
        if not weight_map:
            raise ValueError("weight_map is empty")
        found = {s: _path_inside(directory, s, allow_symlinks) for s in set(weight_map.values())}
    return sorted(found.values()), {tensor: found[shard] for tensor, shard in weight_map.items()}


def _path_inside(directory: str, name: str, allow_symlinks: bool) -> str:
    """The path of an existing file that must not lie outside of the directory."""
    if os.path.isabs(name) or ".." in name.split("/"):
        raise ValueError(f"{name!r} is a path outside the directory")
    path = os.path.join(directory, name)
    try:
        root, real = os.path.realpath(directory), os.path.realpath(path, strict=True)
    except OSError as error:
        raise ValueError(f"{name!r} cannot be opened: {error.strerror}") from error
    if not allow_symlinks and os.path.commonpath([root, real]) != root:
        raise ValueError(f"{name!r} is a symbolic link out of the directory (see allow_symlinks)")
    return path


def open_regular(path: str) -> io.BufferedReader:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # or a FIFO would block
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("not a regular file")
        os.set_blocking(fd, True)  # for io_uring, which would fail with EAGAIN and not wait
        return os.fdopen(fd, "rb")
    except BaseException:
        os.close(fd)
        raise
