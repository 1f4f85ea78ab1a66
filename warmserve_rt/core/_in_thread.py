"""Run a blocking call without blocking an event loop or a thread of its executor."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from warmserve_rt._errors import Cancelled

T = TypeVar("T")


async def in_thread(call: Callable[[Callable[[], None]], T]) -> T:
    """Run ``call(poll)`` in a thread of its own and return its result.

    The call must call ``poll`` while it waits; ``poll`` raises once this coroutine is cancelled.
    The coroutine ends after the call has ended.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[T] = loop.create_future()
    stopped = threading.Event()

    def poll() -> None:
        if stopped.is_set():
            raise Cancelled("the task that waited was cancelled")

    def tell(result: T | None, error: BaseException | None) -> None:
        if ended.done():
            return
        if error is None:
            ended.set_result(result)  # type: ignore[arg-type]
        else:
            ended.set_exception(error)

    def run() -> None:
        result: T | None = None
        error: BaseException | None = None
        try:
            result = call(poll)
        except BaseException as raised:  # passed to the coroutine
            error = raised
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(tell, result, error)

    threading.Thread(target=run, name="warmserve-wait", daemon=True).start()
    try:
        return await asyncio.shield(ended)
    except asyncio.CancelledError:
        stopped.set()
        with suppress(Exception):
            await ended
        raise
