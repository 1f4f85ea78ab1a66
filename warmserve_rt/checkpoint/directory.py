"""A directory that is opened once; its files are opened relative to it and never leave it."""

from __future__ import annotations

import errno
import io
import os
from contextlib import ExitStack, suppress

from .files import naming, open_path, reader

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS = 40  # the kernel's own limit

# These say that the checkpoint is wrong; any other error is the system's.
_BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Directory:
    """A directory by its descriptor, which it owns.

    Every name is resolved here, component by component, each opened relative to the one before it
    and never through a link. A link is read, and its text is resolved in the same way. So there is
    no moment between a check and its use, and no link leaves the directory, whoever moves or
    exchanges names meanwhile. A link into the blobs of the Hugging Face cache of which the
    directory is a snapshot does not leave it.
    """

    def __init__(self, path: str, fd: int, *, allow_symlinks: bool) -> None:
        self.path = path
        self._fd = fd
        self._allow_symlinks = allow_symlinks

    def __enter__(self) -> Directory:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def names(self) -> list[str]:
        """The names in it that are not hidden, sorted."""
        with naming(self.path):
            return sorted(name for name in os.listdir(self._fd) if not name.startswith("."))

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def open(self, name: str) -> io.BufferedReader:
        """Open a file in it. Raises ValueError for a name that leaves the directory, is missing or
        is no regular file; OSError if the system refuses to open it."""
        if os.path.isabs(name) or ".." in name.split("/"):
            raise ValueError(f"{name!r} is a path outside the directory")
        try:
            with naming(self.path_of(name)):
                if self._allow_symlinks:
                    return reader(open_path(name, folder=self._fd))
                return reader(self._walk(name))
        except OSError as error:
            if error.errno not in _BROKEN:
                raise
            raise ValueError(f"{name!r} cannot be opened: {error.strerror}") from error

    def folders_with(self, ending: str) -> list[str]:
        """The folders directly in it that have a file whose name ends so; for messages alone."""
        found = []
        for name in self.names():
            with suppress(OSError):
                fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self._fd)
                try:
                    found += [name] if any(n.endswith(ending) for n in os.listdir(fd)) else []
                finally:
                    os.close(fd)
        return found

    def _walk(self, name: str) -> int:
        links = 0
        pending = _parts(name)
        with ExitStack() as opened:
            folders: list[int] = [self._fd]
            while pending:
                part = pending.pop()
                if part == "..":
                    if len(folders) == 1:
                        raise _leaves(name)
                    folders.pop()
                    continue
                try:
                    if not pending:
                        return open_path(part, folder=folders[-1], follow=False)
                    fd = os.open(part, _FOLDER, dir_fd=folders[-1])
                    opened.callback(os.close, fd)
                    folders.append(fd)
                    continue
                except OSError as error:
                    if error.errno not in (errno.ELOOP, errno.ENOTDIR) or links >= _MOST_LINKS:
                        raise
                    links += 1
                    target = _link(part, folders[-1])
                    if target is None:  # not a link, or not any more: look again
                        pending.append(part)
                        continue
                if not pending and (blob := self._open_blob(target, folders[-1])) is not None:
                    return blob
                if os.path.isabs(target):
                    raise _leaves(name)
                pending += _parts(target)
        raise ValueError("not a regular file but a directory")

    def _open_blob(self, target: str, folder: int) -> int | None:
        """Open what a link in `folder` leads to if it lies in the blobs of the Hugging Face cache
        that this directory is a snapshot of."""
        blobs = self._blobs()
        if blobs is None:
            return None
        where, name = os.path.split(target)
        try:
            try:
                there = os.stat(where or ".", dir_fd=folder)
            except OSError:
                return None
            # The name is opened in the blobs themselves, wherever the link leads by now.
            if not name or not os.path.samestat(there, os.fstat(blobs)):
                return None
            return open_path(name, folder=blobs, follow=False)
        finally:
            os.close(blobs)

    def _blobs(self) -> int | None:
        """Open the blobs of the cache of a model if this is, or lies in, a snapshot there:
        models--ORG--NAME/snapshots/REVISION."""
        with suppress(OSError):
            parts = os.readlink(f"/proc/self/fd/{self._fd}").split("/")
            for i in range(len(parts) - 2, 0, -1):
                if parts[i] == "snapshots" and parts[i - 1].startswith("models--"):
                    return os.open("../" * (len(parts) - i) + "blobs", _FOLDER, dir_fd=self._fd)
        return None


def _parts(path: str) -> list[str]:
    """The components of a relative path, the first one last."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _link(name: str, folder: int) -> str | None:
    """The text of a link, or None if it is none."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _leaves(name: str) -> ValueError:
    return ValueError(f"{name!r} is a symbolic link out of the directory (see allow_symlinks)")
