"""Tickets: a caller's handle on a prewarm or a swap in progress."""

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
    """Bytes that have arrived, and bytes in total."""

    nbytes: int
    total: int

    @property
    def fraction(self) -> float:
        """Share that has arrived, 0.0 to 1.0; 1.0 if the ticket loads nothing."""
        return self.nbytes / self.total if self.total else 1.0


class Ticket:
    """A prewarm or a swap in progress. Made by :meth:`Runtime.prewarm` and :meth:`Runtime.swap`.

    ``await ticket`` and :meth:`wait` return when everything has arrived, and raise the error of a
    failed load. A wait that ends early and a ticket that is dropped leave the load running; only
    :meth:`cancel` stops it.
    """

    def __init__(self, native: _native.Ticket, model: Model) -> None:
        self._native = native
        # Not the model: the ticket would keep its addresses reserved.
        self._layout, self._name = model.layout, model.name
        self._told = False  # the caller has waited, cancelled or taken the descriptor

    def wait(self, timeout: float | None = None, *, layer: int | str | None = None) -> None:
        """Block until everything has arrived, or one layer.

        Parameters
        ----------
        timeout : float, optional
            Seconds. Default: no limit.
        layer : int or str, optional
            Wait for this layer only, by index or name.

        Raises
        ------
        TimeoutError
            ``timeout`` or the ticket's deadline has passed.
        OutOfDeviceMemory, Busy, CorruptCheckpoint, StagingTimeout, Cancelled
            Loading failed or was cancelled.
        ValueError
            The ticket does not load this layer.
        """
        index = None if layer is None else index_in(self._layout, self._name, layer)
        self._told = True
        self._native.wait(check.timeout(timeout), layer=index)

    def __await__(self) -> Generator[object, None, None]:
        """Wait as :meth:`wait` does, without blocking the event loop."""
        return self._arrive().__await__()

    async def _arrive(self) -> None:
        self._told = True
        await until_over(self._native.notify)
        self._native.wait(0)

    def cancel(self) -> None:
        """Stop loading after the chunk that is in flight; a later wait raises Cancelled.

        Layers that have arrived stay resident. No-op if the ticket is done.
        """
        self._told = True
        self._native.cancel()

    def fileno(self) -> int:
        """Return a descriptor that becomes readable when the ticket is done, for example for
        select. The ticket owns it: do not close it."""
        self._told = True
        return self._native.fileno()

    @property
    def done(self) -> bool:
        """Whether loading has ended: everything arrived, or loading failed or was cancelled."""
        return self._native.done

    @property
    def progress(self) -> Progress:
        """Bytes that have arrived and bytes in total; a tuple that also has ``fraction``."""
        return Progress(*self._native.progress)

    def show(self, timeout: float | None = None) -> None:
        """Wait as :meth:`wait` does and show a progress bar, in a notebook or a terminal. Needs
        tqdm."""
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
                with suppress(TimeoutError):  # the ticket's own is raised by the last wait
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
        """Log a failure that was never asked for, as asyncio does for tasks."""
        with suppress(Exception):  # in a forked child
            if not getattr(self, "_told", True) and self._native.done:
                self._warn()

    def _warn(self) -> None:
        try:
            self._native.wait(0)
        except Cancelled:
            pass
        except Exception as error:
            # Not the error: a handler may keep it, and with it the frames of its traceback.
            log.warning("%s failed and was never waited for: %s", self._native.what, str(error))
