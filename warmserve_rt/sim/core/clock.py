"""Run events in the order of their times: one heap of scheduled events, and the current time."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush


class Event:
    """An event that fires at one time. Scheduling it again replaces that time."""

    __slots__ = ("entry",)

    def __init__(self) -> None:
        self.entry = 0  # the number of its entry in the heap, or 0 if it is not scheduled

    def fire(self) -> None:
        raise NotImplementedError


class Timer(Event):
    """An event that calls a function."""

    __slots__ = ("call",)

    def __init__(self, call: Callable[[], None]) -> None:
        super().__init__()
        self.call = call

    def fire(self) -> None:
        self.call()


class Clock:
    """The current time and the queue of events.

    Events of equal times fire in the order of their scheduling.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Event]] = []
        self._number = 0

    def schedule(self, event: Event, time: float) -> None:
        """Schedule an event, and replace the time for which it was scheduled before.

        Parameters
        ----------
        event
            The event.
        time
            The time in seconds; a time that has passed means now.
        """
        self._number += 1
        event.entry = self._number
        now = self.now
        heappush(self._heap, (time if time > now else now, self._number, event))

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Call a function after ``seconds``.

        Parameters
        ----------
        seconds
            Seconds from now on.
        call
            The function.
        """
        self.schedule(Timer(call), self.now + seconds)

    def cancel(self, event: Event) -> None:
        event.entry = 0

    def run(self, until: float) -> None:
        """Fire all events that are due before ``until``, and set the time to ``until``."""
        heap = self._heap
        while heap and heap[0][0] < until:
            time, number, event = heappop(heap)
            if event.entry == number:
                self.now = time
                event.entry = 0
                event.fire()
        self.now = until
