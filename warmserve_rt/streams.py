"""Streams of others: torch's, CuPy's and cuda.core's stand for ours wherever one is taken."""

from __future__ import annotations

from typing import Any, TypeAlias

from . import _native

StreamLike: TypeAlias = Any
"""A stream of ``Runtime.stream()``; of torch (``torch.cuda.current_stream()``), CuPy, or anything
with ``__cuda_stream__``; or a CUstream as an int."""


def native_stream(runtime: _native.Runtime, stream: StreamLike) -> _native.Stream:
    """The stream as the runtime knows it; whoever made it keeps it alive until the lease it ends is
    over. Raises TypeError for what is no stream, ValueError where the device has none but its own.
    """
    if isinstance(stream, _native.Stream):
        return stream
    return runtime.adopt_stream(_handle(stream))


def _handle(stream: StreamLike) -> int:
    if isinstance(stream, int):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:  # a method; an attribute in its first version
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):  # torch, CuPy
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(f"{type(stream).__name__} is no stream")
