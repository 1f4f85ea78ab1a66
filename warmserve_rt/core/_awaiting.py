"""Await native events in asyncio with one descriptor per loop, however many tasks wait."""

from __future__ import annotations

import asyncio
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import monotonic
from typing import TypeAlias

from warmserve_rt import _native

# Requests one wake-up through a waker, by a token. Returns False if the event is over.
Notify: TypeAlias = Callable[[_native.Waker, int], bool]


async def until_over(notify: Notify, timeout: float | None = None) -> bool:
    """Wait until ``notify`` returns False; return False if ``timeout`` seconds pass before.

    A cancelled task stops waiting at once, and its cancellation is never lost.
    """
    loop = asyncio.get_running_loop()
    deadline = None if timeout is None else monotonic() + timeout
    with _loop_wakeups(loop) as wakeups:
        while True:
            woken: asyncio.Future[bool] = loop.create_future()
            token = wakeups.add(woken)
            timer = None
            try:
                if not notify(wakeups.waker, token):
                    return True
                if deadline is not None:
                    timer = loop.call_later(max(deadline - monotonic(), 0), _resolve, woken, False)
                if not await woken:
                    return False
            finally:
                wakeups.waiting.pop(token, None)
                if timer is not None:
                    timer.cancel()


class _Wakeups:
    """The waiters of one loop, by token. Used only by the loop's own thread."""

    def __init__(self) -> None:
        self.waker = _native.Waker()
        self.users = 0
        # Weak: otherwise a task that waits when its loop closes would keep the loop for ever.
        self.waiting: weakref.WeakValueDictionary[int, asyncio.Future[bool]] = (
            weakref.WeakValueDictionary()
        )
        self._tokens = itertools.count()

    def add(self, woken: asyncio.Future[bool]) -> int:
        token = next(self._tokens)
        self.waiting[token] = woken
        return token

    def dispatch(self) -> None:
        for token in self.waker.take():
            if woken := self.waiting.get(token):
                _resolve(woken, True)


# Several threads may run a loop each. Reentrant, because garbage collection may end a waiter.
_lock = threading.RLock()
_wakeups: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Wakeups] = (
    weakref.WeakKeyDictionary()
)


@contextmanager
def _loop_wakeups(loop: asyncio.AbstractEventLoop) -> Iterator[_Wakeups]:
    """Provide the loop's wake-ups, created by its first waiter and removed by its last."""
    with _lock:
        found = _wakeups.get(loop)
        if found is None:
            found = _Wakeups()
            loop.add_reader(found.waker.fileno(), found.dispatch)
            _wakeups[loop] = found
        found.users += 1
    try:
        yield found
    finally:
        with _lock:
            found.users -= 1
            if not found.users:
                _wakeups.pop(loop, None)
                if not loop.is_closed():
                    loop.remove_reader(found.waker.fileno())


def _resolve(woken: asyncio.Future[bool], value: bool) -> None:
    if not woken.done():
        woken.set_result(value)
