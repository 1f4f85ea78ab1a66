"""The acquisitions of one lease by threads and asyncio tasks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NamedTuple

from warmserve_rt._errors import StaleView

from .lease_streams import record_all

if TYPE_CHECKING:
    from warmserve_rt import _native

    from .lease_streams import StreamUse


class Acquisition(NamedTuple):
    """One acquisition of a lease, which may have several."""

    owner: int  # the thread's or the task's number
    native: _native.Lease
    streams: StreamUse | None  # to record on release


class Acquisitions:
    """The acquisitions that have not been released, oldest first.

    Thread-safe without a lock, because each change is a single call of a list method.
    """

    __slots__ = ("_list",)

    def __init__(self) -> None:
        self._list: list[Acquisition] = []

    def __len__(self) -> int:
        return len(self._list)

    def includes(self, acquisition: Acquisition) -> bool:
        """Return whether this very acquisition has not been released."""
        return any(each is acquisition for each in self._list)

    def add(self, owner: int, native: _native.Lease, streams: StreamUse | None) -> None:
        self._list.append(Acquisition(owner, native, streams))

    def latest(self, what: str, owner: int | None = None) -> Acquisition:
        """Return the latest acquisition of the owner (by default this thread), or the latest of
        all if it has none. Raises StaleView, which names ``what``, if there is none."""
        acquired = tuple(self._list)
        if not acquired:
            raise StaleView(f"{what}: the lease is not held")
        me = owner or threading.get_ident()
        for each in reversed(acquired):
            if each.owner == me:
                return each
        return acquired[-1]

    def release_latest(self, owner: int) -> None:
        """Record the streams of the acquisition that :meth:`latest` finds, and release it.

        If a stream is being captured, raise ValueError and release nothing.
        """
        while True:
            found = self.latest("release()", owner)
            streams = () if found.streams is None else found.streams.at_release()
            try:
                self._list.remove(found)
                break
            except ValueError:  # another thread without its own removed it
                continue
        try:
            if streams:
                record_all(found.native, streams)
        finally:
            found.native.release()

    def share(self, owner: int) -> _native.Lease | None:
        """Return a native lease on the layers that are held, or None if none are."""
        if not self._list:
            return None
        try:
            return self._list[-1].native.share(owner)
        except (IndexError, StaleView):  # the last acquirer has just released it
            return None
