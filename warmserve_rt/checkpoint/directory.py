"""Open a directory once, and its files relative to it, so that no name leads out of it."""

from __future__ import annotations

import errno
import io
import os
from contextlib import ExitStack, suppress

from .files import naming, open_path, reader

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_MOST_LINKS = 40  # the kernel's own limit

# These errors mean that the checkpoint is wrong; other errors come from the system.
_BROKEN = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


class Directory:
    """A directory by its descriptor, which it owns.

    Every name is resolved here, component by component. Each component is opened relative to the
    one before it, and never through a link. A link is read, and its text is resolved in the same
    way. So no time passes between a check and its use, and no link leaves the directory, even if
    another process moves or exchanges names meanwhile. If the directory is a model's
    snapshot in the Hugging Face cache, a link into that model's blobs counts as inside.
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
        """Return the sorted names of the directory's files, without hidden ones."""
        with naming(self.path):
            return sorted(name for name in os.listdir(self._fd) if not name.startswith("."))

    def path_of(self, name: str) -> str:
        return os.path.join(self.path, name)

    def open(self, name: str) -> io.BufferedReader:
        """Open a file in the directory.

        Raises ValueError for a name that leaves the directory, is missing or is not a regular file,
        OSError if the system refuses to open it.
        """
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
        """Return the subfolders that have a file with this ending. Only for messages."""
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
                    if target is None:  # not a link, or no longer one: try again
                        pending.append(part)
                        continue
                if not pending and (blob := self._open_blob(target, folders[-1])) is not None:
                    return blob
                if os.path.isabs(target):
                    raise _leaves(name)
                pending += _parts(target)
        raise ValueError("not a regular file but a directory")

    def _open_blob(self, target: str, folder: int) -> int | None:
        """Open the target of a link in `folder` if it is a blob of the Hugging Face cache that this
        directory is a snapshot of; otherwise return None."""
        blobs = self._blobs()
        if blobs is None:
            return None
        where, name = os.path.split(target)
        try:
            try:
                there = os.stat(where or ".", dir_fd=folder)
            except OSError:
                return None
            # Open the name in the blobs themselves, even if the link has changed since.
            if not name or not os.path.samestat(there, os.fstat(blobs)):
                return None
            return open_path(name, folder=blobs, follow=False)
        finally:
            os.close(blobs)

    def _blobs(self) -> int | None:
        """Open the blobs of a model in the cache if this directory is a snapshot of it or is inside
        one, models--ORG--NAME/snapshots/REVISION; otherwise return None."""
        with suppress(OSError):
            parts = os.readlink(f"/proc/self/fd/{self._fd}").split("/")
            for i in range(len(parts) - 2, 0, -1):
                if parts[i] == "snapshots" and parts[i - 1].startswith("models--"):
                    return os.open("../" * (len(parts) - i) + "blobs", _FOLDER, dir_fd=self._fd)
        return None


def _parts(path: str) -> list[str]:
    """Return the components of a relative path in reverse order."""
    return [part for part in reversed(path.split("/")) if part not in ("", ".")]


def _link(name: str, folder: int) -> str | None:
    """Return the text of a link, or None if `name` is not a link."""
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise


def _leaves(name: str) -> ValueError:
    return ValueError(f"{name!r} is a symbolic link out of the directory (see allow_symlinks)")
