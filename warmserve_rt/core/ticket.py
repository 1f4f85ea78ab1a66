"""Tickets: what a caller holds of a prewarm or a swap in progress."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple

from warmserve_rt import _arguments as check
from warmserve_rt._errors import Cancelled
from warmserve_rt._log import log
from warmserve_rt._units import format_bytes

from ._awaiting import until_over
from .selection import index_in

if TYPE_CHECKING:
    from warmserve_rt import _native

    from .model import Model


class Progress(NamedTuple):
    """Bytes that have arrived, and bytes in all."""

    nbytes: int
    total: int

    @property
    def fraction(self) -> float:
        """From 0.0 to 1.0, which is also that of nothing to load."""
        return self.nbytes / self.total if self.total else 1.0


class Ticket:
    """Tells how far a prewarm or a swap is. Made by :meth:`Runtime.prewarm` and
    :meth:`Runtime.swap`.

    ``await ticket`` and :meth:`wait` end when everything has arrived, and raise what loading
    raised. Loading goes on when a wait is given up, and when the ticket is dropped: only
    :meth:`cancel` stops it.
    """

    def __init__(self, native: _native.Ticket, model: Model) -> None:
        self._native = native
        # Not the model, whose addresses would stay reserved as long as the ticket.
        self._layout, self._name = model.layout, model.name
        self._told = False  # somebody has waited, or looked

    def wait(self, timeout: float | None = None, *, layer: int | str | None = None) -> None:
        """Blocks until everything has arrived, or one ``layer``, by index or name.

        Raises TimeoutError after ``timeout`` seconds, and what loading raised: OutOfDeviceMemory,
        Busy, CorruptCheckpoint, StagingTimeout, Cancelled, TimeoutError for a deadline that has
        passed. Raises ValueError for a layer that the ticket does not load.
        """
        index = None if layer is None else index_in(self._layout, self._name, layer)
        self._told = True
        self._native.wait(check.timeout(timeout), layer=index)

    def __await__(self) -> Generator[object, None, None]:
        """Waits without blocking the event loop; otherwise as :meth:`wait`."""
        return self._arrive().__await__()

    async def _arrive(self) -> None:
        self._told = True
        await until_over(self._native.notify)
        self._native.wait(0)

    def cancel(self) -> None:
        """Stops loading after the chunk that is under way; the layers that arrived stay. Does
        nothing once the ticket is done. A later wait raises Cancelled."""
        self._told = True
        self._native.cancel()

    def fileno(self) -> int:
        """Returns a descriptor that becomes readable when the ticket is done, for select and the
        like. The ticket owns it: do not close it."""
        self._told = True
        return self._native.fileno()

    @property
    def done(self) -> bool:
        """Whether nothing more will happen: all has arrived, or loading failed or was cancelled."""
        return self._native.done

    @property
    def progress(self) -> Progress:
        """How many bytes have arrived, of how many: ``progress.fraction``, or unpack the two."""
        return Progress(*self._native.progress)

    def show(self, timeout: float | None = None) -> None:
        """Shows a progress bar until the ticket is done, in a notebook or a terminal; otherwise as
        :meth:`wait`. Needs tqdm."""
        wanted = check.timeout(timeout)
        try:
            from tqdm.auto import tqdm
        except ModuleNotFoundError:
            raise ModuleNotFoundError("ticket.show() needs tqdm: pip install tqdm") from None
        loop_until = None if wanted is None else time.monotonic() + wanted
        with tqdm(
            total=self.progress.total, desc=self._native.what, unit="B", unit_scale=True
        ) as bar:
            while not self.done:
                left = None if loop_until is None else loop_until - time.monotonic()
                if left is not None and left <= 0:
                    break
                with suppress(TimeoutError):  # of this look, or the ticket's own: told below
                    self.wait(0.1 if left is None else min(left, 0.1))
                bar.update(self.progress.nbytes - bar.n)
            bar.update(self.progress.nbytes - bar.n)
        self.wait(0)

    def __repr__(self) -> str:
        done, total = self.progress
        left, layers = self._native.layers_left
        parts = [
            f"{layers - left} of {layers} layers",
            f"{format_bytes(done)} of {format_bytes(total)}",
        ]
        return f"<Ticket: {self._native.what}: {', '.join(parts)}, {self._state()}>"

    def _state(self) -> str:
        if not self.done:
            return "loading"
        try:
            self._native.wait(0)
        except Cancelled:
            return "cancelled"
        except Exception as error:
            return f"failed: {error}"
        return "done"

    def __del__(self) -> None:
        """Logs a failure that nobody asked for, as asyncio does of a task."""
        with suppress(Exception):  # a forked child's
            if not getattr(self, "_told", True) and self._native.done:
                self._warn()

    def _warn(self) -> None:
        try:
            self._native.wait(0)
        except Cancelled:
            pass
        except Exception as error:
            # Not the error: a handler may keep it, and with it the frames that it was raised in.
            log.warning("%s failed, and nobody waited for it: %s", self._native.what, str(error))
