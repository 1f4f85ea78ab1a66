"""Leases: the hold under which a model's weights may be used."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ._errors import StaleView
from .streams import StreamLike, native_stream
from .views import LeasedTensors

if TYPE_CHECKING:
    from . import _native
    from .model import Model


class Lease:
    """A hold on one model or several, all or nothing.

    While it is held every layer of its models is resident and stays; what was missing has been
    loaded, before anything in the background. Made by :meth:`Runtime.lease`; acquired by ``with``,
    ``async with`` or :meth:`acquire`, again after each release.

    One thread (or asyncio task) at a time uses a lease. Leases nest, also on the same model. A
    thread that waits for a lease is taken to release nothing meanwhile: where those that wait would
    wait for each other, the last to ask gets ``Busy``.
    """

    __slots__ = ("__weakref__", "_hold", "_models", "_native", "_stream", "_timeout")

    def __init__(
        self, native: _native.Runtime, models: Sequence[Model], timeout: float | None
    ) -> None:
        self._native = native
        self._models = tuple(models)
        self._timeout = timeout
        self._hold: _native.Hold | None = None
        self._stream: _native.Stream | None = None

    @property
    def models(self) -> tuple[Model, ...]:
        return self._models

    @property
    def held(self) -> bool:
        return self._hold is not None

    def acquire(self, stream: StreamLike | None = None) -> Lease:
        """Takes the lease; blocks, in order of arrival, until everything is resident.

        With ``stream``, :meth:`release` records it: its work may go on after the release, and is
        waited for before anything is unmapped. A stream is one of :meth:`Runtime.stream`, torch's,
        CuPy's or any with ``__cuda_stream__``.

        Raises OutOfDeviceMemory (the models exceed the arena), Busy (see the class), TimeoutError,
        CorruptCheckpoint and what else loading may raise; nothing is held then. Layers that arrived
        stay resident.
        """
        ours = None if stream is None else native_stream(self._native, stream)
        hold = self._begin(threading.get_ident())
        hold.wait(self._timeout)
        self._hold, self._stream = hold, ours
        return self

    def record(self, stream: StreamLike) -> None:
        """What the stream was given so far uses the models: it is waited for before anything is
        unmapped, also after the release. Raises StaleView when the lease is not held."""
        if self._hold is None:
            raise StaleView("record() on a lease that is not held")
        self._hold.record(native_stream(self._native, stream))

    def release(self) -> None:
        """Lets go; wait-free. Raises StaleView when the lease is not held."""
        hold, self._hold = self._hold, None
        if hold is None:
            raise StaleView("release() of a lease that is not held")
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                hold.record(stream)
        finally:
            hold.release()

    def __enter__(self) -> Lease:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    async def __aenter__(self) -> Lease:
        loop = asyncio.get_running_loop()
        hold = self._begin(id(asyncio.current_task()))
        try:
            if not hold.ready:
                arrived = loop.create_future()
                descriptor = hold.fileno()

                def arrive() -> None:
                    if not arrived.done():
                        arrived.set_result(None)

                loop.add_reader(descriptor, arrive)
                try:
                    await asyncio.wait_for(arrived, self._timeout)
                except asyncio.TimeoutError:
                    pass  # wait() below says so, and why
                finally:
                    loop.remove_reader(descriptor)
            hold.wait(0)
        except BaseException:
            hold.release()
            raise
        self._hold = hold
        return self

    async def __aexit__(self, *error: object) -> None:
        self.release()

    @property
    def tensors(self) -> LeasedTensors:
        """The tensors of the one model leased, by name; of several, see :meth:`of`."""
        if len(self._models) != 1:
            raise ValueError("the lease is on several models: of(model) has the tensors of each")
        return self.of(self._models[0])

    def of(self, model: Model) -> LeasedTensors:
        """The tensors of one of the leased models. Raises StaleView when the lease is not held."""
        if model not in self._models:
            raise ValueError(f"{model.name!r} is not in this lease")
        hold = self._hold
        if hold is None:
            raise StaleView(f"{model.name!r} is not leased")
        return LeasedTensors(model.native, model.tensors(), lambda: self._hold is hold)

    def _begin(self, owner: int) -> _native.Hold:
        if self._hold is not None:
            raise ValueError("this lease is held already; a second one nests")
        return self._native.begin_lease([model.native for model in self._models], owner)

    def __del__(self) -> None:
        if getattr(self, "_hold", None) is not None:
            names = ", ".join(repr(model.name) for model in self._models)
            warnings.warn(f"a lease on {names} was never released", ResourceWarning, stacklevel=2)
            self.release()
