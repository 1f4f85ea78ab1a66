"""The streams that a lease records when it is released: their work may go on after the release."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._errors import DeviceLost

from .framework_streams import current_streams, is_captured
from .streams import StreamLike, stream_of_new_lease


class UsedStream(NamedTuple):
    """A stream whose work uses leased layers."""

    native: _native.Stream
    source: StreamLike  # the caller's object, kept alive because its end may destroy the stream


Used: TypeAlias = Mapping[int, UsedStream]  # by handle
# Finds the streams in use now. Takes the runtime and the streams that are known already.
FindStreams: TypeAlias = Callable[[_native.Runtime, Used], Used]


class CurrentStreams:
    """Finds the streams of a CUDA device that are current in torch and CuPy for this thread."""

    def __init__(self, ordinal: int) -> None:
        self._ordinal = ordinal

    def __call__(self, native: _native.Runtime, known: Used) -> Used:
        return {
            handle: known.get(handle) or UsedStream(native.adopt_stream(handle), stream)
            for handle, stream in current_streams(self._ordinal).items()
        }


def given_stream(native: _native.Runtime, stream: StreamLike | None) -> FindStreams | None:
    """Return a function that finds the given stream; None if there is none.

    Raises TypeError and ValueError as :func:`stream_of_new_lease`.
    """
    if stream is None:
        return None
    found = stream_of_new_lease(native, stream)
    used = {found.handle: UsedStream(found, stream)}
    return lambda *_: used


class StreamUse:
    """The streams of one acquisition of a lease, from the acquisition to its release.

    Raises ValueError if a stream is being captured.
    """

    __slots__ = ("_at_acquire", "_find", "_native")

    def __init__(self, native: _native.Runtime, find: FindStreams) -> None:
        self._native, self._find = native, find
        self._at_acquire = find(native, {})
        _refuse_captured("begin", self._at_acquire)

    def at_release(self) -> list[_native.Stream]:
        """Return the streams to record: those of the acquisition, and those found now.

        Raises ValueError if one is being captured. Returns none if the device is lost, because
        there is no memory left to protect.
        """
        try:
            now = self._find(self._native, self._at_acquire)
        except DeviceLost:
            return []
        used = {**self._at_acquire, **now}
        _refuse_captured("end", used)
        return [each.native for each in used.values()]


def record_all(lease: _native.Lease, streams: Iterable[_native.Stream]) -> None:
    """Record each stream, also after another could not be recorded, and raise the first error.

    A lost device is no error.
    """
    errors: list[Exception] = []
    for stream in streams:
        try:
            lease.record(stream)
        except DeviceLost:
            return
        except Exception as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _refuse_captured(what: str, used: Used) -> None:
    # An event that is recorded in a capture belongs to the graph and never completes.
    for each in used.values():
        if is_captured(each.source):
            raise ValueError(
                f"a lease cannot {what} while its stream {check.shown(each.source)} is being "
                "captured into a CUDA graph: acquire the lease before the capture begins, release "
                "it after the capture has ended, and replay the graph under a lease"
            )
