"""The streams of torch and CuPy, if the process has imported them. Nothing is imported here."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from .streams import StreamLike

_LEGACY = (0, 1)  # the default stream, by its two handles


def current_streams(ordinal: int) -> dict[int, StreamLike]:
    """Return this thread's current streams on a CUDA device by their handles.

    A framework has none if it is not imported, or cannot use the device.
    """
    found: dict[int, StreamLike] = {}
    if (stream := _torch_stream(ordinal)) is not None:
        found[stream.cuda_stream] = stream
    if (stream := _cupy_stream(ordinal)) is not None:
        found[stream.ptr] = stream
    return found


def is_captured(stream: StreamLike) -> bool:
    """Return whether a stream of torch or CuPy is being captured. False for any other stream.

    False also if the framework cannot tell, because its device fails. The runtime's own calls then
    say so.
    """
    handle = getattr(stream, "cuda_stream", getattr(stream, "ptr", None))  # torch's, CuPy's
    if handle in _LEGACY:  # it cannot be captured
        return False
    ask: Callable[[], bool] | None = getattr(stream, "is_capturing", None)  # CuPy's
    with suppress(RuntimeError):  # also CuPy's errors
        return bool(ask()) if ask else _torch_captures(stream)
    return False


# Another thread may be importing the framework: then its functions are missing.


def _torch_stream(ordinal: int) -> StreamLike | None:
    cuda: Any = sys.modules.get("torch.cuda")
    is_initialized = getattr(cuda, "is_initialized", None)
    if is_initialized is None or not is_initialized():
        return None
    return cuda.current_stream(ordinal)


def _cupy_stream(ordinal: int) -> StreamLike | None:
    cuda: Any = sys.modules.get("cupy.cuda")
    get_current_stream = getattr(cuda, "get_current_stream", None)
    if get_current_stream is None:
        return None
    try:
        return get_current_stream(ordinal)
    except cuda.runtime.CUDARuntimeError:  # CuPy cannot use CUDA, so it has enqueued no work
        return None


def _torch_captures(stream: StreamLike) -> bool:
    cuda: Any = sys.modules.get("torch.cuda")
    kind: Any = getattr(cuda, "Stream", ())
    if not isinstance(stream, kind):
        return False
    current = cuda.current_device() == stream.device_index and cuda.current_stream() == stream
    if current:
        return bool(cuda.is_current_stream_capturing())
    with cuda.stream(stream):  # torch asks only its current stream
        return bool(cuda.is_current_stream_capturing())
