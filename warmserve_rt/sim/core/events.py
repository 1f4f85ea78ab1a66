"""Run events in the order of their times: one heap of due events, and the current time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Due:
    """An event that happens at one time. Scheduling it again replaces that time."""

    __slots__ = ("due",)

    def __init__(self) -> None:
        self.due = 0  # the number of its entry in the heap, or 0 if it is not scheduled

    def happen(self) -> None:
        raise NotImplementedError


class Timer(Due):
    """An event that calls a function."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self.call = call

    def happen(self) -> None:
        self.call()


class Events:
    """The queue of events. Events of equal times happen in the order of their scheduling."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Due]] = []
        self._number = 0

    def schedule(self, item: Due, time: float) -> None:
        """Schedule an event at ``time`` seconds, or now if that time has passed. Replace the time
        for which the event was scheduled before."""
        self._number += 1
        item.due = self._number
        now = self.now
        heappush(self._heap, (time if time > now else now, self._number, item))

    def cancel(self, item: Due) -> None:
        item.due = 0

    def run(self, until: float) -> None:
        """Run all events that are due before ``until``, and set the time to ``until``."""
        heap = self._heap
        while heap and heap[0][0] < until:
            time, number, item = heappop(heap)
            if item.due == number:
                self.now = time
                item.due = 0
                item.happen()
        self.now = until
