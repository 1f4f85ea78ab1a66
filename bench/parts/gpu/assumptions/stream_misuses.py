"""Misuses of the calls that ask for a stream's context and capture, or wait for a context.

The rows are as those of misuses.py, but no GPU has been asked for these answers yet. CUDA leaves
the use of a destroyed stream undefined.
"""

from __future__ import annotations

from collections.abc import Callable

from warmserve_rt.testing.cuda_api import (
    BLOCKING,
    GLOBAL,
    LEGACY,
    NON_BLOCKING,
    RELAXED,
    Cuda,
    code,
)

from .misuses import GUESS, OK, D, Row, no_context


def destroyed(c: Cuda) -> int:
    stream = c.stream()
    c.stream_destroy(stream)
    return stream


def in_capture(
    c: Cuda, call: Callable[[int], object], mode: int = GLOBAL, flags: int = NON_BLOCKING
) -> None:
    """Make a call while a stream, its argument, is captured; the capture ends in any case."""
    stream = c.stream(flags)
    c.begin_capture(stream, mode)
    try:
        call(stream)
    finally:
        code(c.end_capture, stream)


def end_after(c: Cuda, call: Callable[[int], object], flags: int = NON_BLOCKING) -> None:
    """End a capture after a call that may fail."""
    stream = c.stream(flags)
    c.begin_capture(stream)
    code(call, stream)
    c.end_capture(stream)


def null_context(c: Cuda) -> None:
    no_context(c, lambda: c.stream_context(0))


def null_status(c: Cuda) -> None:
    no_context(c, lambda: c.capture_status(0))


def end_after_sync(c: Cuda) -> None:
    end_after(c, lambda _: c.context_synchronize())


def synchronize_destroyed_context(c: Cuda) -> None:
    c.release_primary()
    c.context_synchronize()


def sync_in(c: Cuda, mode: int = GLOBAL) -> None:
    in_capture(c, lambda _: c.context_synchronize(), mode)


def legacy_status(c: Cuda) -> None:
    in_capture(c, lambda _: c.capture_status(LEGACY))


def blocking_status(c: Cuda) -> None:
    in_capture(c, lambda _: c.capture_status(LEGACY), flags=BLOCKING)


def after_blocking_status(c: Cuda) -> None:
    end_after(c, lambda _: c.capture_status(LEGACY), BLOCKING)


CTX, STATUS, SYNC, END = (
    "cuStreamGetCtx",
    "cuStreamIsCapturing",
    "cuCtxSynchronize",
    "cuStreamEndCapture",
)
STREAMS = [
    Row("context of a stream", lambda c: c.stream_context(c.stream()), OK, 0, D),
    Row("context of the null stream", lambda c: c.stream_context(0), OK, 0, D),
    Row("context of the legacy stream", lambda c: c.stream_context(LEGACY), OK, 0, D),
    Row("context of a stream, no out", lambda c: c.call(CTX, c.stream(), None), CTX, 1, GUESS),
    Row("context of a dead stream", lambda c: c.stream_context(destroyed(c)), CTX, 400, GUESS),
    Row("context of the null stream, none is current", null_context, CTX, 201, D),
    Row("context in a capture", lambda c: in_capture(c, c.stream_context), OK, 0, GUESS),
    Row("capture survives its context", lambda c: end_after(c, c.stream_context), OK, 0, GUESS),
    Row("status of a stream", lambda c: c.capture_status(c.stream()), OK, 0, D),
    Row("status in a capture", lambda c: in_capture(c, c.capture_status), OK, 0, D),
    Row("capture survives its status", lambda c: end_after(c, c.capture_status), OK, 0, D),
    Row("status, no out", lambda c: c.call(STATUS, c.stream(), None), STATUS, 1, D),
    Row("status of a dead stream", lambda c: c.capture_status(destroyed(c)), STATUS, 400, GUESS),
    Row("status of the null stream, no context is current", null_status, STATUS, 201, GUESS),
    Row("status, legacy, beside a blocking capture", blocking_status, STATUS, 906, D),
    Row("blocking capture survives legacy status", after_blocking_status, OK, 0, D),
    Row("status, legacy, beside another capture", legacy_status, OK, 0, D),
    Row("synchronize in a capture", sync_in, SYNC, 900, D),
    Row("synchronize in a relaxed capture", lambda c: sync_in(c, RELAXED), SYNC, 900, D),
    Row("end a capture after synchronize", end_after_sync, END, 901, D),
    Row("synchronize, no context", lambda c: no_context(c, c.context_synchronize), SYNC, 201, D),
    Row("synchronize a destroyed context", synchronize_destroyed_context, SYNC, 709, D),
]
