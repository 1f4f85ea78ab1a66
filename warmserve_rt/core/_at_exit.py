"""Close open runtimes when the interpreter exits.

A runtime that is in use cannot be closed. Its loader threads end all the same: they must not call
the driver while the process takes it down. The end of the process frees its memory.
"""

from __future__ import annotations

import atexit
import weakref
from contextlib import suppress
from typing import Protocol

from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError


class Closable(Protocol):
    def close(self) -> None: ...
    def _stop(self) -> None: ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()


def close_at_exit(runtime: Closable) -> None:
    """Close the runtime when the interpreter exits, if it still exists. Keeps no reference."""
    _open.add(runtime)


@atexit.register
def _close_all() -> None:
    for runtime in list(_open):
        with suppress(WarmServeError):
            runtime.close()
        runtime._stop()
    _native.process_exits()
