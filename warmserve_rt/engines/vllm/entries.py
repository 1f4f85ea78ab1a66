"""Finds, measures and removes the entries of a cache of processed weights.

This module needs neither vLLM nor torch. A folder is an entry if it has a lock file and all its
files have names that :mod:`.cache` writes. No other folder or file is ever removed.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from warmserve_rt._cache_dir import acquire

from .cache_folder import explained

MANIFEST, LOCK = "manifest.json", "lock"
_FILES = re.compile(r"manifest(-[0-9a-f]+)?\.json|(weights|private)-[0-9a-f]+\.safetensors|lock")


@dataclass(frozen=True)
class Stored:
    """An entry on disk.

    ``used`` is the time of the last use, in seconds since the epoch. ``model`` and ``dtype`` are
    empty if the manifest is missing, because a writer was killed or is still writing.
    """

    folder: Path
    model: str
    dtype: str
    nbytes: int
    used: float


@dataclass
class Pruned:
    """The result of :func:`prune`.

    ``busy`` has entries that were kept because they are in use; ``errors`` has the errors of
    removals that failed.
    """

    removed: list[Stored] = field(default_factory=list)
    busy: list[Stored] = field(default_factory=list)
    errors: list[OSError] = field(default_factory=list)


def stored(root: Path) -> list[Stored]:
    """Return all entries, least recently used first. Raises OSError if ``root`` cannot be read."""
    with explained("read", root):
        try:
            folders = [each for each in root.iterdir() if not each.is_symlink() and each.is_dir()]
        except FileNotFoundError:
            return []
        found = (_look_at(folder) for folder in sorted(folders))
        return sorted((each for each in found if each is not None), key=lambda each: each.used)


def in_use(entry: Stored) -> bool:
    """Return whether an engine of any process uses the entry's weights or a process writes it.

    Returns False if the folder's locks cannot be opened. Does not block.
    """
    with suppress(OSError), _unused(entry.folder) as free:
        return not free
    return False


def remove(entry: Stored) -> bool:
    """Remove an entry; return False, with nothing removed, if it is in use.

    Raises OSError, which names the folder, if the entry cannot be removed.
    """
    with explained("remove an entry of", entry.folder), _unused(entry.folder) as free:
        if not free:
            return False
        # The manifest goes first, so that no reader finds a half-removed entry; the lock last.
        for name in sorted(_names(entry.folder), key=lambda each: (each == LOCK, each != MANIFEST)):
            (entry.folder / name).unlink(missing_ok=True)
    with suppress(OSError):  # a process that waited for the lock may have made files again
        entry.folder.rmdir()
    return True


def prune(
    root: Path,
    *,
    keep: int | None = None,
    used_before: float | None = None,
    spare: Path | None = None,
) -> Pruned:
    """Remove entries that are not in use, least recently used first.

    Parameters
    ----------
    root : Path
        The cache's folder.
    keep : int, optional
        Stop when the remaining entries have at most this many bytes.
    used_before : float, optional
        Remove only entries last used before this time, in seconds since the epoch.
    spare : Path, optional
        The folder of an entry that is not removed.

    Returns
    -------
    Pruned
        The removed entries, those in use, and the errors of removals.

    Raises
    ------
    OSError
        The folder cannot be read.

    Notes
    -----
    Without ``keep`` and ``used_before`` all entries are removed.
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
    """Protect a file of weights from removal until the returned descriptor is closed.

    Also records the time of use. The file is needed as long as the weights are registered, because
    a runtime reads it again when it reloads evicted layers. Raises FileNotFoundError if the file
    was removed, and OSError, which names the option, if it is unreadable.
    """
    with explained("read", weights.parent, missing=True):
        descriptor = os.open(weights, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except BaseException:
            os.close(descriptor)
            raise
    with suppress(OSError):  # a read-only folder can be used too
        os.utime(weights.parent / LOCK)
    return descriptor


def remove_unused(folder: Path, kept: set[str]) -> None:
    """Remove the files of an entry that are not in ``kept`` and not in use.

    The caller holds the entry's lock.
    """
    for name in _names(folder):
        if name in kept or name == LOCK:
            continue
        with open(folder / name, "rb") as file, suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            (folder / name).unlink()


@contextmanager
def _unused(folder: Path) -> Iterator[bool]:
    """Take an entry's locks and yield True, or yield False if another process has one of them.

    Does not block.
    """
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
    except OSError:  # removed meanwhile, or owned by another user
        return None
    place = _place(folder)
    model, dtype = (str(place.get(name, "")) for name in ("model", "dtype"))
    return Stored(folder, model, dtype, sum(each.st_size for each in facts), used)


def _names(folder: Path) -> list[str]:
    return os.listdir(folder)


def _place(folder: Path) -> dict[str, Any]:
    """Return the manifest's ``place``, or {} if the manifest is missing or damaged."""
    try:
        place = json.loads((folder / MANIFEST).read_text())["key"]["place"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return place if isinstance(place, dict) else {}
