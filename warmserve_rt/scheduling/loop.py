"""Calls that are due at times of a clock, made one after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count

RETRY_S = 1.0  # until a call that failed is made again


class Loop:
    """Makes calls when they are due: by :meth:`poll`, or in a thread between :meth:`start` and
    :meth:`close`. What a call raises goes to ``failed``; one of :meth:`after` is then made again,
    since it may be what keeps its caller going.

    ``clock``: seconds; for the thread, those of real time. :meth:`after`, :meth:`post` and
    :meth:`close` may be called by any thread.
    """

    def __init__(self, clock: Callable[[], float], failed: Callable[[Exception], None]) -> None:
        self.clock, self._failed = clock, failed
        self._numbers = count()
        self._due: list[tuple[float, int, Callable[[], None], bool]] = []
        self._closed = False
        self._changed = threading.Condition()  # over _due and _closed
        self._thread: threading.Thread | None = None

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        """The call is due so many seconds from now."""
        self._push(self.clock() + seconds, call, again=True)

    def post(self, call: Callable[[], None]) -> None:
        """The call is due now, behind others that are."""
        self._push(self.clock(), call, again=False)

    def poll(self) -> float | None:
        """Makes the calls that are due; returns seconds until the next, None where none is."""
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
            except Exception as error:  # whatever it is, the other calls are still due
                self._failed(error)
                if again:
                    self.after(RETRY_S, call)

    def start(self) -> None:
        """A daemon thread polls from now on. Raises ValueError where one does, or did."""
        if self._thread or self._closed:
            raise ValueError("the loop has been started before")
        self._thread = threading.Thread(target=self._run, name="warmserve-loop", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No more calls are made, when the one that is being made has ended; idempotent."""
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
                # What came since the poll counts too.
                left = self._due[0][0] - self.clock() if self._due else None
                if left is None or left > 0:
                    self._changed.wait(left)
