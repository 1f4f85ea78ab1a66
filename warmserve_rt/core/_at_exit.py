"""Closes what is open when the interpreter exits; what cannot be closed goes with the process."""

from __future__ import annotations

import atexit
import weakref
from contextlib import suppress
from typing import Protocol

from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError


class Closable(Protocol):
    def close(self) -> None: ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_at_exit(runtime: Closable) -> None:
    """Closes the runtime when the interpreter exits, if it lives until then."""
    _open.add(runtime)


@atexit.register
def _close_all() -> None:
    for runtime in list(_open):
        with suppress(WarmServeError):
            runtime.close()
    _native.process_exits()
