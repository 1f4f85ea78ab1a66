"""The folder of a cache of processed weights: where it is, how large it may be, and its errors.

This module needs neither vLLM nor torch.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warmserve_rt._cache_dir import cache_dir
from warmserve_rt._units import parse_bytes

DEFAULT_LIMIT = "50%"  # of the file system's size
OPTION = 'option "cache" of model_loader_extra_config'
_PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?)\s*%", re.ASCII)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def root_of(cache: str | os.PathLike[str] | None) -> Path:
    """Return the folder of the option "cache"; the default is a folder in the user's cache.

    Raises OSError, which names the option, if the user has no home directory.
    """
    try:
        return cache_dir() / "vllm" if cache is None else Path(cache).expanduser()
    except (OSError, RuntimeError) as error:
        raise OSError(f"{error}, or name a folder with the {OPTION}") from None


def bytes_of_limit(limit: int | str, root: Path, name: str = "cache_limit") -> int:
    """Return the bytes of a limit.

    Parameters
    ----------
    limit : int or str
        Bytes, a size such as "200GiB", or a share such as "50%" of the file system of ``root``.
    root : Path
        The cache's folder. It need not exist.
    name : str
        The name of the option, for the error message.

    Raises
    ------
    ValueError
        The limit is none of these. The message begins with ``name``.
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


@contextmanager
def explained(
    doing: str, folder: Path, *, needs: int | None = None, missing: bool = False
) -> Iterator[None]:
    """Extend the message of an OSError by the action, the folder and the option, once.

    Parameters
    ----------
    doing : str
        The action, as in "cannot {doing} the cache".
    folder : Path
        The folder that the action was on.
    needs : int, optional
        Bytes that the action needs.
    missing : bool
        Let FileNotFoundError pass unchanged.
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
