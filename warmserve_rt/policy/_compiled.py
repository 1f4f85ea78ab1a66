"""Compile the planner's loops with numba, and cache the machine code on disk if possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

LOG = logging.getLogger("warmserve_rt")
_Function = TypeVar("_Function", bound=Callable[..., object])


@cache
def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return the name, the date in ns and the size of each Python file of a folder."""
    found = [(path.name, path.stat()) for path in sorted(folder.glob("*.py"))]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in found)


class _OptionalCache(FunctionCache):
    """A cache of compiled code on disk that never fails.

    Numba compares the date of the function's own file only, and the code of the functions that it
    calls is compiled into it. This cache compares all files of the folder, and of this one.

    If a file cannot be read, the code is compiled again. If a file cannot be written (a full disk,
    a quota, a limit on file sizes), the code is not cached.
    """

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        folder = Path(function.__code__.co_filename).parent
        self._cache_file = IndexDataCacheFile(  # type: ignore[no-untyped-call]
            cache_path=self._cache_path,
            filename_base=self._impl.filename_base,
            source_stamp=(_stamp(folder), _stamp(Path(__file__).parent)),
        )

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # unpickling can raise any exception
            LOG.info("cached code is unreadable, compiling again: %s", error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except Exception as error:
            LOG.info("compiled code is not cached: %s", error)


def jit(function: _Function) -> _Function:
    """Compile a function at its first call, and cache the code beside the file or in the user's
    folder. If no such folder can be written, each process compiles for itself."""
    compiled: Any = njit(error_model="numpy")(function)
    try:
        compiled._cache = _OptionalCache(function)
    except (RuntimeError, OSError) as error:
        LOG.info("compiled code is not cached: %s", error)
    return compiled  # type: ignore[no-any-return]


def jit_inner(function: _Function) -> _Function:
    """Compile a function that only compiled functions call."""
    options: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True}
    compiled: Any = njit(**options)
    return compiled(function)  # type: ignore[no-any-return]
