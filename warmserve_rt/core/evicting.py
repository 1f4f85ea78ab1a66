"""What takes models out of a runtime: evict, unregister and close, blocking or awaited.

All three take the same two arguments. ``wait`` says what to wait for: "streams" that were recorded
and still use the layers, with Busy if they are leased; those and the end of "leases"; or "nothing",
with Busy in either case. Without ``wait`` it is "leases" if a ``timeout`` is given, else "streams".
Leases are waited for until a moment at which there is none; new ones may begin meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt._log import log

from ._in_thread import in_thread
from .inspecting import Inspecting
from .model import Model
from .selection import Layers, all_but, layer_indices

Wait: TypeAlias = Literal["nothing", "streams", "leases"]
Poll: TypeAlias = Callable[[], None]


class Evicting(Inspecting):
    """The part of :class:`Runtime` that takes models out."""

    def evict(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        keep: Layers | None = None,
        wait: Wait | None = None,
        timeout: float | None = None,
    ) -> None:
        """Takes a model out of the arena, or these ``layers`` of it, or all but those to ``keep``.

        Cancels loads of these layers. Tickets that also cover other layers finish those, then
        raise Cancelled.

        ``wait``: "streams", "leases" or "nothing" (:mod:`warmserve_rt.core.evicting`); "leases" if
        a ``timeout`` is given, else "streams".
        ``timeout``: seconds to wait.

        Raises Busy, TimeoutError, and ValueError as :meth:`prewarm`. Per layer.
        """
        self._evict(self._eviction(model, layers, keep), *_patience(wait, timeout))

    async def aevict(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        keep: Layers | None = None,
        wait: Wait | None = None,
        timeout: float | None = None,
    ) -> None:
        """As :meth:`evict`, without blocking the event loop. Cancelling it ends the wait."""
        chosen = self._eviction(model, layers, keep)
        patience, seconds = _patience(wait, timeout)
        await in_thread(lambda poll: self._evict(chosen, patience, seconds, poll))

    def unregister(
        self, model: Model | str, *, wait: Wait | None = None, timeout: float | None = None
    ) -> None:
        """Evicts a model and forgets it. Views of it keep their addresses, with nothing behind.

        If a bare name stood for the model, the name is unknown until the next :meth:`promote` or
        registration. ``wait`` and ``timeout`` are those of :meth:`evict`; raises as that. Leases
        that still wait for the model raise Cancelled.
        """
        self._unregister(self.model(model), *_patience(wait, timeout))

    async def aunregister(
        self, model: Model | str, *, wait: Wait | None = None, timeout: float | None = None
    ) -> None:
        """As :meth:`unregister`, without blocking the event loop. Cancelling it ends the wait."""
        found = self.model(model)
        patience, seconds = _patience(wait, timeout)
        await in_thread(lambda poll: self._unregister(found, patience, seconds, poll))

    def close(self, *, wait: Wait | None = None, timeout: float | None = None) -> None:
        """Evicts everything and gives all memory back; idempotent. Views that outlive the runtime
        keep their addresses, with nothing behind.

        ``wait`` and ``timeout`` are those of :meth:`evict`. Raises Busy and TimeoutError, after
        which the runtime is open and nothing has changed.
        """
        self._close(*_patience(wait, timeout))

    async def aclose(self, *, wait: Wait | None = None, timeout: float | None = None) -> None:
        """As :meth:`close`, without blocking the event loop. Cancelling it ends the wait."""
        patience, seconds = _patience(wait, timeout)
        await in_thread(lambda poll: self._close(patience, seconds, poll))

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def _eviction(
        self, model: Model | str, layers: Layers | None, keep: Layers | None
    ) -> tuple[Model, list[int] | None]:
        """Returns the model and its layers to evict, None for all."""
        found = self.model(model)
        if keep is None:
            return found, layer_indices(found, layers)
        if layers is not None:
            raise ValueError("either the layers to evict, or those to keep")
        return found, all_but(found, keep)

    def _evict(
        self,
        chosen: tuple[Model, list[int] | None],
        wait: Wait,
        timeout: float | None,
        poll: Poll | None = None,
    ) -> None:
        model, layers = chosen
        native = self.native
        if layers != []:
            native.evict(model.native, layers, timeout, wait, poll)
        log.debug(
            "evicted %s of %r", "all" if layers is None else f"{len(layers)} layers", model.name
        )

    def _unregister(
        self, model: Model, wait: Wait, timeout: float | None, poll: Poll | None = None
    ) -> None:
        self.native.unregister(model.native, timeout, wait, poll)
        self._models.remove(model)
        log.info("unregistered %r", model.name)

    def _close(self, wait: Wait, timeout: float | None, poll: Poll | None = None) -> None:
        native = self._open
        if native is None:
            return
        native.close(timeout, wait, poll)
        self._open = None
        self._models.clear()
        log.info("closed the runtime on %s", self._device)


def _patience(wait: Wait | None, timeout: float | None) -> tuple[Wait, float | None]:
    seconds = check.timeout(timeout)
    if wait is None:
        return "leases" if seconds is not None else "streams", seconds
    check.choice("wait", wait, ("nothing", "streams", "leases"))
    return wait, seconds
