"""Streams of others: torch's, CuPy's and cuda.core's stand for ours wherever one is taken."""

from __future__ import annotations

from typing import Any, TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt import _native

StreamLike: TypeAlias = Any
"""A stream of ``Runtime.stream()``; of torch (``torch.cuda.current_stream()``), CuPy, or anything
with ``__cuda_stream__``; or a CUstream as an int."""


def native_stream(runtime: _native.Runtime, stream: StreamLike) -> _native.Stream:
    """Returns the stream as the runtime knows it; its owner must keep it alive until the lease that
    it ends is over. Raises TypeError for what is not a stream, ValueError if the device has no
    streams but its own.
    """
    if isinstance(stream, _native.Stream):
        return stream
    return runtime.adopt_stream(_handle(stream))


def _handle(stream: StreamLike) -> int:
    if hasattr(stream, "__index__") and not isinstance(stream, bool):
        return check.integer("stream", stream, 0, 2**64 - 1)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:  # a method; an attribute in its first version
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):  # torch, CuPy
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(
        "stream must be one of Runtime.stream(), of torch or CuPy, have __cuda_stream__, or be a "
        f"CUstream as an integer, got {check.shown(stream)}"
    )
