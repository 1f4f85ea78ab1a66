"""The runtime that a serving engine imports."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Literal

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._units import Size

from ._at_exit import close_at_exit
from .evicting import Evicting
from .lease import Lease
from .lease_streams import given_stream
from .loading import Loading
from .model import Model
from .options import open_runtime
from .registering import Registering
from .routes import Route
from .selection import Layers, layer_indices
from .streams import CURRENT_STREAMS, StreamLike
from .views import Framework

_ONE_MODEL = (str, Model)


class Runtime(Registering, Loading, Evicting):
    """One device's memory, shared by many models.

    A context manager, also for ``async with``: it closes the runtime at the end of the block.

    Parameters
    ----------
    device : "host", "cuda" or "cuda:N"
        The device whose memory holds the models. "cuda" is the first GPU.
    arena : size, optional
        Device memory to own, all allocated at once. "50%" is a share of the device's memory.
        Default: 2 GiB, or, if ``headroom`` is given, all free memory except the headroom.
    staging : size
        The most pinned host memory to use, in chunks of ``chunk`` bytes. "5%" is a share of the
        machine's memory. Unused if the CPU can access the device's memory directly.
    host_cache : size
        Pinned host memory that keeps layers which have been loaded, so that loading them again
        reads no file. "50%" is a share of the machine's memory. It is pinned in the background and
        kept until :meth:`close`; layers leave it by keep value. Unused if the CPU can access the
        device's memory directly. Default: 0, no cache.
    headroom : size, optional
        Device memory to leave to others (torch's activations, KV caches), or a share of the
        device's memory. If less would stay free, the arena is refused, and later not grown back.
    granule : size, optional
        A multiple of the device's granularity. Every layer takes whole granules. Default: 2 MiB on
        the host, and 16 MiB on CUDA, because a GPU maps one of 16 MiB as fast as one of 2 MiB.
    max_padding : float, optional
        The largest share of a layer's granules that its tensors may leave unused, 0 to 1.
        :meth:`register` merges neighbouring layers that would leave more: they are then resident
        together. A model that becomes one layer may leave more. 1 merges none. Default: 0.05 on
        CUDA, and 1 on the host, whose granules are small.
    chunk : size
        Bytes of one copy through the staging memory.
    loaders : int, optional
        Threads that load, 1 to 1024. Default: the CPUs that the process may use minus one, at
        least one and at most eight.
    staging_timeout : float
        Seconds that a load waits for a free chunk before it fails with StagingTimeout.
    pump : bool
        Start no threads; the caller loads by calling :meth:`step`.
    poison : bool
        Let evicted addresses read as NaN instead of faulting, for debugging.
    fence : "streams" or "device"
        What an eviction waits for before it unmaps layers. "streams": the recorded streams that use
        them. "device": these, and all work of this process on the device, for debugging: if a
        program that dies of an illegal access then works, some work was not recorded. It is slow,
        and an eviction fails, and ends the capture, while any stream of the device is captured.
    background_share : float
        The most that loads of priority BACKGROUND or lower get while foreground loads wait, as a
        share of the bytes, 0 to 1. While no foreground load waits they get everything.
    read_bandwidth : size, optional
        Limit on what all loads together read, in bytes per second (1e9, "1GiB"). Default: no limit.
    tensors : "torch", "numpy", "cupy" or "dlpack", optional
        What leases hand out. "numpy" is for the host, "cupy" for CUDA. "dlpack" gives objects with
        ``__dlpack__``, ``address`` and ``nbytes``. Default: "torch" if it is installed; otherwise
        "numpy" on the host, and on CUDA "cupy" if it is installed or else "dlpack".
    driver : native driver, optional
        Use this driver instead of opening ``device``, for tests.
    broker : path, optional
        Use the arena of the broker that listens at this path (:class:`Broker`), beside other
        processes. The broker owns the memory and loads the models, so ``arena``, ``headroom``,
        ``granule``, ``host_cache``, ``poison`` and ``routes`` must not be given. Host only.
    broker_timeout : float
        Seconds that loads wait for another broker at the path if this one ends. Layers that are
        mapped stay usable meanwhile, and afterwards until nothing holds them.
    name : str, optional
        What a broker calls this process in its messages. Default: the program's name.
    routes : sequence of "cuda:N"
        Peers whose host links foreground loads may use too. Each peer gives four chunks of its
        memory (:mod:`warmserve_rt.core.routes`).

    Raises
    ------
    ValueError, TypeError
        The device is unknown or an option is invalid.
    OutOfDeviceMemory
        The device has no room for the arena.
    WarmServeError
        The device cannot be used; the message says what to do.

    Notes
    -----
    A size is a number of bytes, or a string such as "2GiB" (units of 1024) or "2GB" (units of
    1000).

    After the device is lost (its CUDA context died), every operation that needs it raises
    DeviceLost. Releasing leases, snapshots and :meth:`close` still work.

    In a forked child every method raises WarmServeError, and the models' addresses are not mapped.

    Thread-safe.
    """

    def __init__(
        self,
        device: str = "host",
        arena: Size | None = None,
        staging: Size = "256MiB",
        *,
        host_cache: Size = 0,
        headroom: Size | None = None,
        granule: Size | None = None,
        max_padding: float | None = None,
        chunk: Size = "8MiB",
        loaders: int | None = None,
        staging_timeout: float = 30.0,
        pump: bool = False,
        poison: bool = False,
        fence: Literal["streams", "device"] = "streams",
        background_share: float = 0.05,
        read_bandwidth: Size | None = None,
        tensors: Framework | None = None,
        driver: _native.Driver | None = None,
        routes: Sequence[Route] = (),
        broker: str | os.PathLike[str] | None = None,
        broker_timeout: float = 5.0,
        name: str | None = None,
    ) -> None:
        super().__init__(
            *open_runtime(
                device,
                arena=arena,
                staging=staging,
                host_cache=host_cache,
                headroom=headroom,
                granule=granule,
                max_padding=max_padding,
                chunk=chunk,
                loaders=loaders,
                staging_timeout=staging_timeout,
                pump=pump,
                poison=poison,
                fence=fence,
                background_share=background_share,
                read_bandwidth=read_bandwidth,
                tensors=tensors,
                driver=driver,
                routes=routes,
                broker=broker,
                broker_timeout=broker_timeout,
                name=name,
            )
        )
        close_at_exit(self)

    def __enter__(self) -> Runtime:
        return self

    async def __aenter__(self) -> Runtime:
        return self

    def guard(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        timeout: float | None = None,
    ) -> _native.Guard:
        """Return a reusable lease, for code that leases the same layers at every step.

        A guard is a context manager with ``acquire()`` and ``release()``. It holds its layers as a
        lease does, any number of times and from any thread; ``holds`` counts them. It records no
        stream, hands out no tensors (see :meth:`Model.tensors`) and is always on whole layers.

        In a client of a broker, a guard keeps its lease while it is not held, so that acquiring it
        again takes a fraction of a microsecond. The lease ends as soon as the broker, an eviction
        or another lease needs the layers.

        Parameters
        ----------
        model : Model or str
        layers : int, slice, or indices and names, optional
            Default: all.
        timeout : float, optional
            Seconds that each acquisition waits at most. Default: no limit.

        Raises
        ------
        ValueError, TypeError
            The model or a layer is unknown, or the device is not the host: on other devices work is
            still under way when a step ends, so use :meth:`lease`.
        """
        found = self.model(model)
        if self._device != "host":
            raise ValueError(f"a guard must be on the host, and this runtime is on {self._device}")
        return self.native.guard(found.native, layer_indices(found, layers), check.timeout(timeout))

    def lease(
        self,
        models: Model | str | Sequence[Model | str],
        *,
        layers: Layers | None = None,
        streaming: bool = False,
        timeout: float | None = None,
        stream: StreamLike | None = CURRENT_STREAMS,
    ) -> Lease:
        """Return a lease that is not yet acquired. See :class:`Lease`.

        Parameters
        ----------
        models : Model, str, or a sequence of them
            One model, or several that are leased all or nothing.
        layers : int, slice, or indices and names, optional
            Some layers of a single model. Default: all.
        streaming : bool
            Let the lease begin while layers are still loading. :meth:`Lease.wait` then waits for a
            layer.
        timeout : float, optional
            Seconds that each acquisition waits at most. Default: no limit.
        stream : stream or None, optional
            The stream that each release records, as for :meth:`Lease.acquire`. None: none. Default:
            on CUDA the streams that are current in torch and in CuPy at the acquisition and at the
            release; on the host none.

        Raises
        ------
        ValueError, TypeError
            A model or layer is unknown, no model is named, ``layers`` is given for several models,
            or ``stream`` is not a stream of the device.
        """
        if isinstance(models, _ONE_MODEL) or not isinstance(models, Iterable):
            wanted: tuple[Model, ...] = (self.model(models),)
        else:
            wanted = tuple(dict.fromkeys(map(self.model, models)))
        if not wanted:
            raise ValueError("a lease needs at least one model")
        if layers is not None and len(wanted) > 1:
            raise ValueError("layers must be None for several models: lease each model by itself")
        chosen = None if layers is None else layer_indices(wanted[0], layers)
        if streaming is not False:
            streaming = check.flag("streaming", streaming)
        if timeout is not None:
            timeout = check.timeout(timeout)
        find = self._current_streams
        if stream is not CURRENT_STREAMS:
            find = given_stream(self.native, stream)
        return Lease(
            self.native, wanted, chosen, streaming=streaming, timeout=timeout, find_streams=find
        )
