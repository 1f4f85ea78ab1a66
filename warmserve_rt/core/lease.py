"""Leases: the hold under which a model's weights may be used."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt._errors import StaleView
from warmserve_rt._log import debug
from warmserve_rt._units import format_bytes

from ._awaiting import until_over
from .selection import layer_index
from .streams import StreamLike, native_stream
from .views import LeasedTensors, Tensors

if TYPE_CHECKING:
    from warmserve_rt import _native

    from .model import Model


# One of possibly several by which a lease is held: of which thread or task, and the stream to
# record at its end.
_Acquisition: TypeAlias = "tuple[int, _native.Hold, _native.Stream | None]"


class Lease:
    """A hold on one model or several, all or nothing, or on some layers of one.

    While it is held its layers stay, and what was missing is loaded before anything in the
    background. Without ``streaming`` all are resident once it is acquired; with it, a layer may be
    used after :meth:`wait`. Made by :meth:`Runtime.lease`; acquired by ``with``, ``async with`` or
    :meth:`acquire`.

    A lease may be acquired again while it is held, by any thread (or asyncio task), and is held
    until the last has released it: whoever joins takes nothing new and waits behind nobody. Leases
    nest, also on the same model. A thread that waits for a lease is taken to release nothing
    meanwhile: where those that wait would wait for each other, the last to ask gets ``Busy``.
    """

    __slots__ = (
        "__weakref__",
        "_acquired",
        "_layers",
        "_models",
        "_native",
        "_streaming",
        "_timeout",
    )

    def __init__(
        self,
        native: _native.Runtime,
        models: Sequence[Model],
        layers: list[int] | None,
        *,
        streaming: bool,
        timeout: float | None,
    ) -> None:
        self._native = native
        self._models = tuple(models)
        self._layers = layers
        self._streaming = streaming
        self._timeout = timeout
        self._acquired: list[_Acquisition] = []  # changed by single calls of the list's own

    def __repr__(self) -> str:
        names = ", ".join(repr(model.name) for model in self._models)
        what = "" if self._layers is None else f"{len(self._layers)} layers of "
        held = f"held {len(self._acquired)} times" if len(self._acquired) > 1 else "held"
        return (
            f"<Lease on {what}{names}: {format_bytes(self._nbytes())}, "
            f"{'streaming, ' if self._streaming else ''}{held if self._acquired else 'not held'}>"
        )

    def _nbytes(self) -> int:
        if self._layers is None:
            return sum(model.nbytes for model in self._models)
        return sum(self._models[0].layers[index].nbytes for index in self._layers)

    @property
    def models(self) -> tuple[Model, ...]:
        return self._models

    @property
    def held(self) -> bool:
        return bool(self._acquired)

    def acquire(self, stream: StreamLike | None = None) -> Lease:
        """Takes the lease; blocks, in order of arrival, until everything is resident; with
        ``streaming``, until there is room for everything.

        With ``stream``, :meth:`release` records it: its work may go on after the release, and is
        waited for before anything is unmapped. A stream is one of :meth:`Runtime.stream`, torch's,
        CuPy's or any with ``__cuda_stream__``.

        Raises OutOfDeviceMemory (the layers exceed the arena), Busy (see the class), TimeoutError,
        CorruptCheckpoint and what else loading may raise; nothing is held then. Layers that arrived
        stay resident.
        """
        ours = None if stream is None else native_stream(self._native, stream)
        owner = threading.get_ident()
        hold = self._begin(owner)
        if hold.wait(self._timeout, not self._streaming):
            debug("waited for %s", self)
        self._acquired.append((owner, hold, ours))
        return self

    def wait(
        self,
        layer: int | str,
        stream: StreamLike | None = None,
        *,
        model: Model | None = None,
        timeout: float | None = None,
    ) -> None:
        """Orders what comes after it behind the arrival of one layer, by index or name.

        Blocks until it is resident. With a ``stream`` it is the stream that waits for the layer's
        copies, and the caller goes on as soon as these are all under way. ``model`` says of which,
        where the lease is on several.

        Raises StaleView when the lease is not held, TimeoutError, ValueError (a layer that is not
        in the lease), and what loading met; layers that arrived can be used all the same.
        """
        of = model or self._only_model()
        behind = None if stream is None else native_stream(self._native, stream)
        _, hold, _ = self._latest("wait()")
        hold.wait_layer(of.native, layer_index(of, layer), behind, check.timeout(timeout))

    def record(self, stream: StreamLike) -> None:
        """What the stream was given so far uses the layers: it is waited for before any is
        unmapped, also after the release. Raises StaleView when the lease is not held."""
        _, hold, _ = self._latest("record()")
        hold.record(native_stream(self._native, stream))

    def release(self) -> None:
        """Lets go of the latest acquisition, of this thread (or task) if it has one; wait-free.
        Raises StaleView when the lease is not held."""
        self._leave(threading.get_ident())

    def __enter__(self) -> Lease:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    async def __aenter__(self) -> Lease:
        owner = id(asyncio.current_task())
        hold = self._begin(owner)
        everything = not self._streaming

        def notify(waker: _native.Waker, token: int) -> bool:
            return hold.notify(waker, token, everything)

        try:
            if not hold.ready(everything):
                await until_over(notify, self._timeout)
            hold.wait(0, everything)  # raises what went wrong, a timeout included
        except BaseException:
            hold.release()
            raise
        self._acquired.append((owner, hold, None))
        return self

    async def __aexit__(self, *error: object) -> None:
        self._leave(id(asyncio.current_task()))

    @property
    def tensors(self) -> LeasedTensors:
        """The tensors of the one model leased, by name; of several, see :meth:`of`."""
        return self.of(self._only_model())

    def of(self, model: Model) -> LeasedTensors:
        """The tensors of one of the leased models. Raises StaleView when the lease is not held."""
        return self._checked(model, model.tensors())

    def cupy(self, model: Model | None = None) -> LeasedTensors:
        """The tensors as CuPy arrays, whatever the runtime makes of them otherwise, of a model or
        of the only one; zero-copy, and checked as those of :attr:`tensors`. CuPy knows no read-only
        arrays: writing to one is a fault all the same.

        Raises StaleView when the lease is not held, ValueError on the host, whose memory CuPy
        cannot see, and ImportError where CuPy is not installed.
        """
        model = model or self._only_model()
        return self._checked(model, model.tensors("cupy"))

    def _checked(self, model: Model, tensors: Tensors) -> LeasedTensors:
        if model not in self._models:
            raise ValueError(f"{model.name!r} is not in this lease")
        mine = self._latest(f"the tensors of {model.name!r}")
        hold = mine[1]

        def held() -> bool:
            return any(each is mine for each in self._acquired)

        def here(layer: int) -> bool:
            return hold.arrived(model.native, layer)

        complete = self._layers is None and not self._streaming
        return LeasedTensors(model.name, model.layout, tensors, held, None if complete else here)

    def _only_model(self) -> Model:
        if len(self._models) != 1:
            raise ValueError("the lease is on several models: say of which")
        return self._models[0]

    def _latest(self, what: str, owner: int | None = None) -> _Acquisition:
        """Of this thread (or the owner) if it has one."""
        acquired = tuple(self._acquired)
        if not acquired:
            raise StaleView(f"{what}: the lease is not held")
        me = owner or threading.get_ident()
        return next((each for each in reversed(acquired) if each[0] == me), acquired[-1])

    def _leave(self, owner: int) -> None:
        while True:
            mine = self._latest("release()", owner)
            with suppress(ValueError):  # another thread took it for want of its own
                self._acquired.remove(mine)
                break
        _, hold, stream = mine
        try:
            if stream is not None:
                hold.record(stream)
        finally:
            hold.release()

    def _begin(self, owner: int) -> _native.Hold:
        if self._acquired:
            with suppress(IndexError, StaleView):  # the last has just let go
                return self._acquired[-1][1].share(owner)
        models = [model.native for model in self._models]
        return self._native.begin_lease(models, owner, self._layers)

    def __del__(self) -> None:
        if getattr(self, "_acquired", None):
            names = ", ".join(repr(model.name) for model in self._models)
            warnings.warn(f"a lease on {names} was never released", ResourceWarning, stacklevel=2)
            while self._acquired:
                self.release()
