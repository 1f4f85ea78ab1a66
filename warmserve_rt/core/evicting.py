"""Operations that free memory, and the keep values that order evictions.

Evict, unregister and close, blocking or awaited, take ``wait``, which says what they wait for, and
``timeout`` in seconds:

- "streams": recorded streams that still use the layers. Raises Busy if the layers are leased.
- "leases": those streams, and the end of all leases.
- "nothing": raises Busy if a stream uses the layers or a lease holds them.

By default ``wait`` is "leases" if a ``timeout`` is given, else "streams". A forward pass of a bound
module counts as a stream, except that :meth:`Runtime.close` waits for one only with "leases" and
raises Busy otherwise. Waiting for leases ends at the first moment without any; new ones may begin
meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt._log import log
from warmserve_rt._units import format_bytes

from ._in_thread import in_thread
from .inspecting import Inspecting
from .model import Model
from .selection import Layers, all_but, layer_index, layer_indices

Wait: TypeAlias = Literal["nothing", "streams", "leases"]
Poll: TypeAlias = Callable[[], None]


class Evicting(Inspecting):
    """The part of :class:`Runtime` that frees memory."""

    def evict(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        keep: Layers | None = None,
        wait: Wait | None = None,
        timeout: float | None = None,
    ) -> None:
        """Evict a model, or some of its layers, from the arena.

        Cancels loads of these layers. Tickets that also cover other layers finish those, then
        raise Cancelled.

        Parameters
        ----------
        model : Model or str
        layers : int, slice, or indices and names, optional
            The layers to evict. Default: all.
        keep : int, slice, or indices and names, optional
            Evict all layers except these. Excludes ``layers``.
        wait : "streams", "leases" or "nothing", optional
            What to wait for (:mod:`warmserve_rt.core.evicting`). Default: "leases" if a ``timeout``
            is given, else "streams".
        timeout : float, optional
            Seconds to wait at most. Default: no limit.

        Raises
        ------
        Busy
            A lease or a stream uses the layers and ``wait`` does not include it, or the calling
            thread would wait for its own pass.
        TimeoutError
            The layers were still in use after ``timeout``.
        ValueError
            A layer is unknown or repeated, or ``layers`` names none.

        Guarantee: per layer (every layer keeps a defined state, and calling again continues from
        there).
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
        """As :meth:`evict`, without blocking the event loop. Cancelling the task ends the wait."""
        chosen = self._eviction(model, layers, keep)
        patience, seconds = _patience(wait, timeout)
        await in_thread(lambda poll: self._evict(chosen, patience, seconds, poll))

    def set_keep_value(
        self, model: Model | str, keep_value: float, *, layer: int | str | None = None
    ) -> None:
        """Set how much a model, or one layer of it, is worth keeping.

        When room is needed, layers with the lowest value are evicted first. Among equals, a model
        loses its last layers first, and the model used least recently is the first to lose any.

        Parameters
        ----------
        model : Model or str
        keep_value : float
            Any number, infinities included. At first every layer has 0.0.
        layer : int or str, optional
            Index or name. Default: all layers.

        Guarantee: wait-free.
        """
        found = self.model(model)
        index = None if layer is None else layer_index(found, layer)
        value = check.number("keep_value", keep_value, finite=False)
        self.native.set_keep_value(found.native, value, index)

    def set_keep_values(self, model: Model | str, keep_values: Sequence[float]) -> None:
        """Set the keep values of all layers of a model at once.

        Parameters
        ----------
        model : Model or str
        keep_values : sequence of float
            A value for each layer, in execution order; see :meth:`set_keep_value`.

        Raises
        ------
        ValueError
            A value is not a number, or the model has another number of layers.

        Guarantee: strong (after an exception nothing has changed); wait-free.
        """
        values = [check.number("keep_value", value, finite=False) for value in keep_values]
        self.native.set_keep_values(self.model(model).native, values)

    def trim(self) -> int:
        """Give free granules back to the device and return their bytes.

        The runtime creates granules again when it needs them.
        """
        nbytes = self.native.trim()
        log.info("trimmed %s", format_bytes(nbytes))
        return nbytes

    def unregister(
        self, model: Model | str, *, wait: Wait | None = None, timeout: float | None = None
    ) -> None:
        """Evict a model and forget it.

        Views of the model keep their addresses, but no memory is mapped there. Leases that still
        wait for the model raise Cancelled. If a bare name stood for the model, that name is unknown
        until the next :meth:`promote` or registration.

        ``wait``, ``timeout`` and errors are those of :meth:`evict`.
        """
        self._unregister(self.model(model), *_patience(wait, timeout))

    async def aunregister(
        self, model: Model | str, *, wait: Wait | None = None, timeout: float | None = None
    ) -> None:
        """As :meth:`unregister`, without blocking the event loop. Cancelling the task ends the
        wait."""
        found = self.model(model)
        patience, seconds = _patience(wait, timeout)
        await in_thread(lambda poll: self._unregister(found, patience, seconds, poll))

    def close(self, *, wait: Wait | None = None, timeout: float | None = None) -> None:
        """Evict everything and give all memory back. Idempotent.

        Views that outlive the runtime keep their addresses, but no memory is mapped there.

        Parameters
        ----------
        wait, timeout
            As for :meth:`evict`.

        Raises
        ------
        Busy, TimeoutError
            Something is in use. The runtime is still open, and nothing has changed.
        WarmServeError
            The driver did not take everything back. Calling again continues from there.
        """
        self._close(*_patience(wait, timeout))

    async def aclose(self, *, wait: Wait | None = None, timeout: float | None = None) -> None:
        """As :meth:`close`, without blocking the event loop. Cancelling the task ends the wait."""
        patience, seconds = _patience(wait, timeout)
        await in_thread(lambda poll: self._close(patience, seconds, poll))

    def __exit__(self, *error: object) -> None:
        self.close()

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    def _eviction(
        self, model: Model | str, layers: Layers | None, keep: Layers | None
    ) -> tuple[Model, list[int] | None]:
        """Return the model and the layers to evict, None for all."""
        found = self.model(model)
        if keep is None:
            return found, layer_indices(found, layers)
        if layers is not None:
            raise ValueError(
                "layers and keep exclude each other: name the layers to evict or to keep"
            )
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

    def _stop(self) -> None:
        """End the loader threads, whatever is leased, for the exit of the interpreter."""
        if self._open is not None:
            self._open.stop()

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
