"""Make calls at given times of a clock, one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

RETRY_S = 1.0  # wait before a failed call is made again


class Loop:
    """Make calls when they are due: in :meth:`poll`, or in a thread between :meth:`start` and
    :meth:`close`.

    A failed call of :meth:`after` is made again after ``RETRY_S``, because its caller may depend
    on the call to go on. A failed call of :meth:`post` is not repeated.

    Parameters
    ----------
    clock
        Returns the time in seconds. The thread needs a clock of real time.
    failed
        Called with each exception that a call raises.

    Notes
    -----
    :meth:`after`, :meth:`post` and :meth:`close` are thread-safe.
    """

    def __init__(self, clock: Callable[[], float], failed: Callable[[Exception], None]) -> None:
        self.clock, self._failed = clock, failed
        self._numbers = count()
        self._due: list[tuple[float, int, Callable[[], None], bool]] = []
        self._closed = False
        self._changed = threading.Condition()  # over _due and _closed
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """Schedule a call in this many seconds."""
        self._push(self.clock() + seconds, call, again=True)

    def post(self, call: Callable[[], None]) -> None:
        """Schedule a call for now, behind the calls that are already due."""
        self._push(self.clock(), call, again=False)

    def poll(self) -> float | None:
        """Make the calls that are due. Return the seconds until the next call, or None if no call
        is scheduled."""
        while True:
            with self._changed:
                if not self._due:
                    return None
                left = self._due[0][0] - self.clock()
                if left > 0:
                    return left
                _, _, call, again = heappop(self._due)
            try:
                call()
            except Exception as error:  # a failed call must not stop the others
                self._failed(error)
                if again:
                    self.after(RETRY_S, call)

    def start(self) -> None:
        """Start a daemon thread that polls.

        Raises
        ------
        ValueError
            If the loop was started or closed before.
        """
        if self._thread or self._closed:
            raise ValueError("the loop has been started before")
        self._thread = threading.Thread(target=self._run, name="warmserve-loop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Drop all scheduled calls and stop the thread. Idempotent.

        Waits for the call that the thread is making, unless that call closes the loop itself.
        """
        with self._changed:
            self._closed = True
            self._due.clear()
            self._changed.notify_all()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join()

    def _push(self, due: float, call: Callable[[], None], *, again: bool) -> None:
        with self._changed:
            if self._closed:
                return
            heappush(self._due, (due, next(self._numbers), call, again))
            if self._due[0][2] is call:
                self._changed.notify_all()

    def _run(self) -> None:
        while True:
            self.poll()
            with self._changed:
                if self._closed:
                    return
                # Calls may have been scheduled since the poll.
                left = self._due[0][0] - self.clock() if self._due else None
                if left is None or left > 0:
                    self._changed.wait(left)
