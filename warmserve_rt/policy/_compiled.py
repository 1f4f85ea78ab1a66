"""Compiles the planner's loops with numba, and caches machine code on disk if that is possible."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

from numba import njit
from numba.core.caching import FunctionCache

LOG = logging.getLogger("warmserve_rt")
_Function = TypeVar("_Function", bound=Callable[..., object])


class _OptionalCache(FunctionCache):
    """Compiled code on disk. A file that cannot be read is compiled anew, and one that cannot be
    written (a full disk, a quota, a limit on file sizes) is left out."""

    def load_overload(self, signature: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(signature, target_context)  # type: ignore[no-untyped-call]
        except Exception as error:  # unpickling raises anything
            LOG.info("compiling again, the cached code is unreadable: %s", error)
            return None

    def save_overload(self, signature: Any, data: Any) -> None:
        try:
            super().save_overload(signature, data)  # type: ignore[no-untyped-call]
        except Exception as error:
            LOG.info("compiled code is not cached: %s", error)


def entry(function: _Function) -> _Function:
    """Compiles at the first call, and caches the code beside the file or in the user's folder.
    Without a folder that can be written each process compiles for itself."""
    compiled: Any = njit(error_model="numpy")(function)
    try:
        compiled._cache = _OptionalCache(function)  # type: ignore[no-untyped-call]
    except (RuntimeError, OSError) as error:
        LOG.info("compiled code is not cached: %s", error)
    return compiled  # type: ignore[no-any-return]


def inner(function: _Function) -> _Function:
    """Compiles into the functions that call it."""
    options: dict[str, Any] = {"error_model": "numpy", "no_cpython_wrapper": True}
    compiled: Any = njit(**options)
    return compiled(function)  # type: ignore[no-any-return]
