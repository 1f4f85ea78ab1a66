"""Leases: a model's weights may be used only while a lease holds them."""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

from warmserve_rt import _arguments as check
from warmserve_rt._log import debug
from warmserve_rt._units import format_bytes

from ._acquisitions import Acquisitions
from ._awaiting import until_over
from .lease_streams import FindStreams, StreamUse, given_stream
from .selection import layer_index
from .streams import STREAM_OF_LEASE, StreamLike, native_stream
from .views import LeasedTensors, Tensors

if TYPE_CHECKING:
    from warmserve_rt import _native

    from .model import Model


class Lease:
    """A lease on one model, on several models all or nothing, or on some layers of one model.

    Made by :meth:`Runtime.lease`; acquired by ``with``, ``async with`` or :meth:`acquire`.

    While a lease is held its layers are not evicted, and missing layers load before any background
    load. Without ``streaming`` all layers are resident once the lease is acquired. With it, a layer
    may be used after :meth:`wait`.

    On CUDA a lease may be released while the device still computes. The release records streams:
    the given one, or those that are current in torch and in CuPy when a thread acquires the lease
    and when it releases it. No layer is unmapped before their work so far completes.

    Notes
    -----
    Any thread or asyncio task may acquire a lease that is already held. That acquisition takes no
    new memory and does not queue behind waiting leases. The lease is held until the last acquirer
    has released it.

    Leases nest, also on the same model. We assume that a thread waiting for a lease releases none.
    If waiting leases would deadlock, the newest request fails with ``Busy``.

    A stream that is being captured cannot be recorded: acquire the lease before the capture begins,
    release it after the capture has ended, and replay the graph under a lease.
    """

    __slots__ = (
        "__weakref__",
        "_acquired",
        "_find_streams",
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
        find_streams: FindStreams | None,
    ) -> None:
        self._native = native
        self._models = tuple(models)
        self._layers = layers
        self._streaming = streaming
        self._timeout = timeout
        self._find_streams = find_streams  # None: the release records nothing
        self._acquired = Acquisitions()

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
        """The leased models."""
        return self._models

    @property
    def held(self) -> bool:
        """Whether any thread or task has acquired the lease and not released it."""
        return bool(self._acquired)

    def acquire(self, stream: StreamLike | None = STREAM_OF_LEASE) -> Lease:
        """Acquire the lease and return it.

        Blocks, in order of arrival, until every layer is resident, or with ``streaming`` until the
        arena has room for every layer.

        Parameters
        ----------
        stream : stream or None, optional
            The stream that :meth:`release` records: one of :meth:`Runtime.stream`, torch or CuPy,
            or any object with ``__cuda_stream__``. None: it records none, so all work on the layers
            must be complete then. Default: as given to :meth:`Runtime.lease`.

        Raises
        ------
        OutOfDeviceMemory
            The layers exceed the arena.
        Busy
            Waiting would deadlock (see the class).
        TimeoutError
            The lease was not acquired within its timeout.
        CorruptCheckpoint
            A file has changed or a digest differs. Other errors of loading are raised too.
        ValueError
            The stream is being captured (see the class).

        After an exception nothing is held; layers that have arrived stay resident.
        """
        find = self._find_streams
        if stream is not STREAM_OF_LEASE:
            find = given_stream(self._native, stream)
        streams = None if find is None else StreamUse(self._native, find)
        owner = threading.get_ident()
        native = self._begin(owner)
        if native.wait(self._timeout, not self._streaming):
            debug("waited for %s", self)
        self._acquired.add(owner, native, streams)
        return self

    def wait(
        self,
        layer: int | str,
        stream: StreamLike | None = None,
        *,
        model: Model | None = None,
        timeout: float | None = None,
    ) -> None:
        """Wait until one layer may be used.

        Without a stream, blocks until the layer is resident. With one, blocks until the layer's
        copies are enqueued and makes the stream wait for them.

        Parameters
        ----------
        layer : int or str
            Index or name.
        stream : stream, optional
            A stream as for :meth:`acquire`.
        model : Model, optional
            The layer's model; required if the lease is on several.
        timeout : float, optional
            Seconds. Default: no limit.

        Raises
        ------
        StaleView
            The lease is not held.
        TimeoutError
            The layer did not arrive in time.
        ValueError
            The layer is not in the lease.

        Errors of loading are raised too. Layers that have arrived can still be used then.
        """
        of = model or self._only_model()
        behind = None if stream is None else native_stream(self._native, stream)
        native = self._acquired.latest("wait()").native
        native.wait_layer(of.native, layer_index(of, layer), behind, check.timeout(timeout))

    def record(self, stream: StreamLike) -> None:
        """Record that the stream's work so far uses the layers.

        No layer is unmapped before that work completes, even after the release. Raises StaleView if
        the lease is not held.
        """
        self._acquired.latest("record()").native.record(native_stream(self._native, stream))

    def release(self) -> None:
        """Release the latest acquisition of this thread (or task), or the latest of all if it has
        none. Wait-free.

        Raises
        ------
        StaleView
            The lease is not held.
        ValueError
            A stream to record is being captured (see the class). The lease is still held.
        """
        self._acquired.release_latest(threading.get_ident())

    def __enter__(self) -> Lease:
        return self.acquire()

    def __exit__(self, *error: object) -> None:
        self.release()

    async def __aenter__(self) -> Lease:
        find = self._find_streams
        streams = None if find is None else StreamUse(self._native, find)
        owner = id(asyncio.current_task())
        native = self._begin(owner)
        everything = not self._streaming

        def notify(waker: _native.Waker, token: int) -> bool:
            return native.notify(waker, token, everything)

        try:
            if not native.ready(everything):
                await until_over(notify, self._timeout)
            native.wait(0, everything)  # raises the error of a failed load, or TimeoutError
        except BaseException:
            native.release()
            raise
        self._acquired.add(owner, native, streams)
        return self

    async def __aexit__(self, *error: object) -> None:
        self._acquired.release_latest(id(asyncio.current_task()))

    @property
    def tensors(self) -> LeasedTensors:
        """The tensors of the leased model, by name. If the lease is on several, use :meth:`of`."""
        return self.of(self._only_model())

    def of(self, model: Model) -> LeasedTensors:
        """Return the tensors of one leased model, by name. Raises StaleView if the lease is not
        held."""
        return self._checked(model, model.tensors())

    def cupy(self, model: Model | None = None) -> LeasedTensors:
        """Return the tensors as CuPy arrays, whatever framework the runtime uses.

        Zero-copy, and checked like :attr:`tensors`. CuPy has no read-only arrays, so writing to one
        faults unless the model is writable.

        Parameters
        ----------
        model : Model, optional
            Required if the lease is on several.

        Raises
        ------
        StaleView
            The lease is not held.
        ValueError
            The runtime is on the host, whose memory CuPy cannot see.
        ImportError
            CuPy is not installed.
        """
        model = model or self._only_model()
        return self._checked(model, model.tensors("cupy"))

    def _checked(self, model: Model, tensors: Tensors) -> LeasedTensors:
        if model not in self._models:
            raise ValueError(f"{model.name!r} is not in this lease")
        mine = self._acquired.latest(f"the tensors of {model.name!r}")

        def held() -> bool:
            return self._acquired.includes(mine)

        def here(layer: int) -> bool:
            return mine.native.arrived(model.native, layer)

        complete = self._layers is None and not self._streaming
        return LeasedTensors(model.name, model.layout, tensors, held, None if complete else here)

    def _only_model(self) -> Model:
        if len(self._models) != 1:
            raise ValueError("the lease is on several models: name one of them")
        return self._models[0]

    def _begin(self, owner: int) -> _native.Lease:
        shared = self._acquired.share(owner)
        if shared is not None:
            return shared
        models = [model.native for model in self._models]
        return self._native.begin_lease(models, owner, self._layers)

    def __del__(self) -> None:
        if getattr(self, "_acquired", None):
            names = ", ".join(repr(model.name) for model in self._models)
            warnings.warn(f"a lease on {names} was never released", ResourceWarning, stacklevel=2)
            while self._acquired:
                self.release()
