"""The rows of the simulator tests' table of misuses and their error codes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lib.cuda import CudaError, Gpu, NotRun

from . import Assumption, Refuted, add
from .misuses import HOST, MEMORY, SHARING, WORK
from .stream_misuses import STREAMS

# Rows that would affect other rows, for example by reserving addresses that these need, or that may
# end the process.
_ALONE = {
    "init with flags",
    "reserve with a hint",
    "context of a dead stream",
    "status of a dead stream",
    "synchronize a destroyed context",
}
_ELSEWHERE = {"create too much": "exhaustion is a row of its own"}


def _check(row: Any) -> Callable[[Gpu], str | None]:
    def check(cuda: Gpu) -> str | None:
        if why := _ELSEWHERE.get(row.name):
            raise NotRun(why)
        failed = ("", 0)
        try:
            row.calls(cuda)
        except CudaError as error:
            if error.function == "cuDevicePrimaryCtxRetain" and error.code == 101:
                raise NotRun("there is one device") from None
            failed = (error.function, error.code)
        if row.lenient and failed == ("", 0):
            return "the device accepts it, the simulator does not"
        if failed != (row.function, row.error):
            raise Refuted("no error" if failed == ("", 0) else f"{failed[1]} from {failed[0]}")
        return None

    return check


def _add_all() -> None:
    for row in [*MEMORY, *SHARING, *HOST, *WORK, *STREAMS]:
        assumes = f"{row.function} returns {row.error}" if row.function else "no error"
        add(Assumption(row.name, assumes, row.source, _check(row), row.name in _ALONE))


_add_all()
