"""The order in which things happen: one heap of what is due, and the time of the last that was."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Due:
    """Something that happens at one time, or, rescheduled, at another instead."""

    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due = 0  # the number of its entry in the heap; 0: it is not scheduled

    def happen(self) -> None:
        raise NotImplementedError


class Timer(Due):
    """Calls a function."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self.call = call

    def happen(self) -> None:
        self.call()


class Events:
    """Events of equal times happen in the order in which they were scheduled."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Due]] = []
        self._number = 0

    def schedule(self, item: Due, time: float) -> None:
        """At ``time`` seconds, or now if that has passed; instead of when it was scheduled for."""
        self._number += 1
        item.due = self._number
        now = self.now
        heappush(self._heap, (time if time > now else now, self._number, item))

    def cancel(self, item: Due) -> None:
        item.due = 0

    def run(self, until: float) -> None:
        """All that is due before ``until``; then it is that time."""
        heap = self._heap
        while heap and heap[0][0] < until:
            time, number, item = heappop(heap)
            if item.due == number:
                self.now = time
                item.due = 0
                item.happen()
        self.now = until
