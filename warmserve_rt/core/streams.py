"""Foreign streams: those of torch, CuPy and cuda.core are accepted wherever ours are."""

from __future__ import annotations

from enum import Enum
from typing import Any, Final, TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt import _native

StreamLike: TypeAlias = Any
"""A stream of ``Runtime.stream()``, torch (``torch.cuda.current_stream()``) or CuPy, any object
with ``__cuda_stream__``, or a CUstream as an int."""


class StreamChoice(Enum):
    """The defaults of ``stream`` where None has another meaning."""

    CURRENT = "CURRENT_STREAMS"
    OF_LEASE = "STREAM_OF_LEASE"

    def __repr__(self) -> str:
        return self.value


CURRENT_STREAMS: Final = StreamChoice.CURRENT
STREAM_OF_LEASE: Final = StreamChoice.OF_LEASE


def native_stream(runtime: _native.Runtime, stream: StreamLike) -> _native.Stream:
    """Return the runtime's object for a stream.

    The owner of a foreign stream must keep it alive until the lease that records it has ended.
    Raises TypeError if ``stream`` is not a stream, ValueError if the device accepts only its own
    streams, or if the stream was destroyed or belongs to another device or context.
    """
    if isinstance(stream, _native.Stream):
        return stream
    return runtime.adopt_stream(_handle(stream))


def stream_of_new_lease(runtime: _native.Runtime, stream: StreamLike) -> _native.Stream:
    """As :func:`native_stream`, but raise ValueError also if the stream is being captured.

    Recording a stream and waiting on it check this in the native core, after the stream's earlier
    work is protected.
    """
    if isinstance(stream, _native.Stream):
        stream.refuse_capture()
        return stream
    return runtime.adopt_stream(_handle(stream), True)


def _handle(stream: StreamLike) -> int:
    if hasattr(stream, "__index__") and not isinstance(stream, bool):
        return check.integer("stream", stream, 0, 2**64 - 1)
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:  # an attribute in the protocol's first version, else a method
        return int((protocol() if callable(protocol) else protocol)[1])
    for name in ("cuda_stream", "ptr"):  # torch, CuPy
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise TypeError(
        "stream must be one of Runtime.stream(), of torch or CuPy, have __cuda_stream__, or be a "
        f"CUstream as an integer, got {check.shown(stream)}"
    )
