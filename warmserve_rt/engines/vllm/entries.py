"""Finds, measures and removes the entries of a cache of processed weights.

This needs neither vLLM nor torch. A folder is an entry if it holds a lock and nothing but files of
the names that :mod:`.cache` writes; nothing else is ever removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmserve_rt._cache_dir import acquire, cache_dir
from warmserve_rt._units import parse_bytes

MANIFEST, LOCK = "manifest.json", "lock"
DEFAULT_LIMIT = "50%"  # of the file system
OPTION = 'option "cache" of model_loader_extra_config'
_FILES = re.compile(r"manifest(-[0-9a-f]+)?\.json|(weights|private)-[0-9a-f]+\.safetensors|lock")
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*%", re.ASCII)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Stored:
    """An entry as it lies on the disk. ``used``: seconds since the epoch. ``model`` and ``dtype``
    are empty if there is no manifest: a writer was killed, or writes now."""

    folder: Path
    model: str
    dtype: str
    nbytes: int
    used: float


@dataclass
class Pruned:
    """``busy``: entries that were to be removed but are in use; ``errors``: those that could not
    be removed."""

    removed: list[Stored] = field(default_factory=list)
    busy: list[Stored] = field(default_factory=list)
    errors: list[OSError] = field(default_factory=list)


def root_of(cache: str | os.PathLike[str] | None) -> Path:
    """Returns the folder of the option "cache"; by default one in the user's cache.

    Raises OSError, naming the option, if there is no home to put it in.
    """
    try:
        return cache_dir() / "vllm" if cache is None else Path(cache).expanduser()
    except (OSError, RuntimeError) as error:
        raise OSError(f"{error}, or name a folder with the {OPTION}") from None


def bytes_of_limit(limit: int | str, root: Path, name: str = "cache_limit") -> int:
    """Returns the bytes of a size, or of a share such as "50%" of the file system of ``root``.

    Raises ValueError, beginning with ``name``, for anything else.
    """
    share = _PERCENT.fullmatch(limit.strip()) if isinstance(limit, str) else None
    if share is not None and float(share[1]) <= 100:
        while not root.exists() and root != root.parent:
            root = root.parent
        return int(shutil.disk_usage(root).total * (float(share[1]) / 100))
    try:
        return parse_bytes(limit)
    except (TypeError, ValueError):
        raise ValueError(
            f"{name} must be a number of bytes, a size such as '200GiB' or a share of the file "
            f"system such as '50%', got {limit!r}"
        ) from None


def stored(root: Path) -> list[Stored]:
    """Returns all entries, the least recently used first. Raises OSError if they cannot be read."""
    with explained("read", root):
        try:
            folders = [each for each in root.iterdir() if not each.is_symlink() and each.is_dir()]
        except FileNotFoundError:
            return []
        found = (_look_at(folder) for folder in sorted(folders))
        return sorted((each for each in found if each is not None), key=lambda each: each.used)


def in_use(entry: Stored) -> bool:
    """Whether an engine of any process has the entry's weights, or a process writes it. False if
    the folder's locks cannot be opened."""
    with suppress(OSError), _unused(entry.folder) as free:
        return not free
    return False


def remove(entry: Stored) -> bool:
    """Removes an entry; returns False, with nothing removed, if it is in use.

    Raises OSError, naming the folder, if it cannot be removed.
    """
    with explained("remove an entry of", entry.folder), _unused(entry.folder) as free:
        if not free:
            return False
        # Without its manifest an entry is not found any more.
        for name in sorted(_names(entry.folder), key=lambda each: (each == LOCK, each != MANIFEST)):
            (entry.folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # a process that waited for the lock has made it again
        entry.folder.rmdir()
    return True


def prune(
    root: Path,
    *,
    keep: int | None = None,
    used_before: float | None = None,
    spare: Path | None = None,
) -> Pruned:
    """Removes entries that are not in use, the least recently used first, but ``spare``.

    ``keep``: until the rest has at most so many bytes. ``used_before``: those last used before that
    time. With neither it removes all. Raises OSError if the folder cannot be read.
    """
    found = stored(root)
    total = sum(each.nbytes for each in found)
    done = Pruned()
    for each in found:
        if keep is not None and total <= keep:
            break
        if each.folder == spare or (used_before is not None and each.used >= used_before):
            continue
        try:
            if remove(each):
                done.removed.append(each)
                total -= each.nbytes
            else:
                done.busy.append(each)
        except OSError as error:
            done.errors.append(error)
    return done


def open_for_use(weights: Path) -> int:
    """Keeps a file of weights from being removed until this descriptor is closed, and notes the
    use. A runtime reads the file again whenever its layers return.

    Raises FileNotFoundError if it was removed, and OSError, naming the option, if it is unreadable.
    """
    with explained("read", weights.parent, missing=True):
        descriptor = os.open(weights, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
    with suppress(OSError):  # a folder that cannot be written serves as well
        os.utime(weights.parent / LOCK)
    return descriptor


def remove_unused(folder: Path, kept: set[str]) -> None:
    """Removes the files of an entry that are not ``kept`` and not in use. The caller holds its
    lock."""
    for name in _names(folder):
        if name in kept or name == LOCK:
            continue
        with open(folder / name, "rb") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / name).unlink()


@contextmanager
def explained(
    doing: str, folder: Path, *, needs: int | None = None, missing: bool = False
) -> Iterator[None]:
    """Says of an OSError, once, what was tried in which folder and which option names another.

    ``missing``: FileNotFoundError passes unchanged.
    """
    try:
        yield
    except OSError as error:
        if OPTION in str(error) or (missing and isinstance(error, FileNotFoundError)):
            raise
        where = "" if error.filename in (None, str(folder)) else f" ({error.filename})"
        size = "" if needs is None else f", which need {needs} bytes"
        room = "run `warmserve-rt cache prune`, or " if error.errno in _FULL else ""
        raise OSError(
            error.errno,
            f"cannot {doing} the cache of processed weights in {folder}{size}: "
            f"{error.strerror or error}{where}; {room}name another folder with the {OPTION}",
        ) from error


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Holds an entry's locks and yields True; yields False if another process has one of them."""
    held: list[int] = []
    try:
        held.append(acquire(folder / LOCK, wait=False))
        for name in _names(folder):
            if name.startswith("weights-"):
                held.append(os.open(folder / name, os.O_RDONLY | os.O_CLOEXEC))
                fcntl.flock(held[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        free = True
    except BlockingIOError:
        free = False
    try:
        yield free
    finally:
        for each in held:
            os.close(each)


def _look_at(folder: Path) -> Stored | None:
    try:
        names = _names(folder)
        if LOCK not in names or not all(map(_FILES.fullmatch, names)):
            return None
        facts = [(folder / name).stat(follow_symlinks=False) for name in names]
        used = (folder / LOCK).stat().st_mtime
    except OSError:  # removed meanwhile, or of another user
        return None
    place = _place(folder)
    model, dtype = (str(place.get(name, "")) for name in ("model", "dtype"))
    return Stored(folder, model, dtype, sum(each.st_size for each in facts), used)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder)


def _place(folder: Path) -> dict[str, Any]:
    """Returns what the manifest says the weights are of, or nothing if it is missing or damaged."""
    try:
        place = json.loads((folder / MANIFEST).read_text())["key"]["place"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return place if isinstance(place, dict) else {}
