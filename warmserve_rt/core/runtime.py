"""The runtime that a serving engine imports."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._log import debug, log
from warmserve_rt._units import Size, format_bytes
from warmserve_rt.checkpoint import Source
from warmserve_rt.checkpoint.dtypes import DTypeLike
from warmserve_rt.checkpoint.layout import Grouping

from ._at_exit import close_at_exit
from .evicting import Evicting
from .lease import Lease
from .model import Model
from .options import open_runtime
from .registration import Digests, Origin, Verify, anchored
from .revisions import difference, parse_name
from .routes import Path
from .selection import Layers, layer_index, layer_indices
from .ticket import Ticket
from .views import Framework

__all__ = ["BACKGROUND", "FOREGROUND", "Model", "Runtime", "Ticket"]

BACKGROUND, FOREGROUND = 0, 100
_ONE_MODEL = (str, Model)


class Runtime(Evicting):
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
    headroom : size, optional
        Device memory to leave to others (torch's activations, KV caches), or a share of the
        device's memory. If less would stay free, the arena is refused, and later not grown back.
    granule : size
        A multiple of the device's granularity. Every layer takes whole granules. A GPU maps a
        granule of 8 MiB as fast as one of 2 MiB.
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
    paths : sequence of "cuda:N"
        Neighbours whose host links foreground loads may use too. Each neighbour gives four chunks
        of its memory (:mod:`warmserve_rt.core.routes`).

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
        headroom: Size | None = None,
        granule: Size = "2MiB",
        chunk: Size = "8MiB",
        loaders: int | None = None,
        staging_timeout: float = 30.0,
        pump: bool = False,
        poison: bool = False,
        background_share: float = 0.05,
        read_bandwidth: Size | None = None,
        tensors: Framework | None = None,
        driver: _native.Driver | None = None,
        paths: Sequence[Path] = (),
    ) -> None:
        super().__init__(
            *open_runtime(
                device,
                arena=arena,
                staging=staging,
                headroom=headroom,
                granule=granule,
                chunk=chunk,
                loaders=loaders,
                staging_timeout=staging_timeout,
                pump=pump,
                poison=poison,
                background_share=background_share,
                read_bandwidth=read_bandwidth,
                tensors=tensors,
                driver=driver,
                paths=paths,
            )
        )
        close_at_exit(self)

    def __enter__(self) -> Runtime:
        return self

    async def __aenter__(self) -> Runtime:
        return self

    def register(
        self,
        name: str,
        checkpoint: Source | None = None,
        *,
        dtype: DTypeLike | Mapping[str, DTypeLike] | None = None,
        layers: Grouping | None = None,
        writable: bool = False,
        allow_symlinks: bool = False,
        variant: str | None = None,
        revision: str | None = None,
        verify: Verify | None = None,
        digests: Digests | None = None,
    ) -> Model:
        """Register a model without loading it.

        Its files stay open until the model is unregistered.

        Parameters
        ----------
        name : str
            "chat", or "chat@2" for a revision. Revisions are separate models. The bare name stands
            for the revision registered first, until :meth:`promote`.
        checkpoint : path, sequence of paths, or str, optional
            A safetensors file, a list of them, a Hugging Face directory, or the id of a model in
            the Hugging Face cache ("org/name"). Default: the bare ``name`` with its revision, so
            that ``register("org/name")`` is enough.
        dtype : dtype or mapping from tensor names to dtypes, optional
            "bfloat16", "float16" or "float32", or a dtype of torch or numpy. Plain floating-point
            weights are cast to it while they are loaded; with a mapping, only the tensors that it
            names. Quantised tensors, and the floats that belong to them, keep their dtypes
            (:func:`dtypes.planned_casts`). Default: no casts.
        layers : grouping, optional
            How tensors form layers if their names do not tell; see :func:`layout.build_layout`.
        writable : bool
            Allow in-place writes to the weights, which eviction discards. Otherwise they fault.
        allow_symlinks : bool
            Follow symbolic links that leave the checkpoint's directory. Links of the Hugging Face
            cache into its own blobs are always followed.
        variant : str, optional
            "fp16" takes model.fp16.safetensors of a directory instead of model.safetensors.
        revision : str, optional
            Revision of a model in the Hugging Face cache. Default: "main".
        verify : "full" or "sampled", optional
            "full" reads the files now to compute a digest of every granule, and compares it after
            each load of a layer. "sampled" does so for some granules of each layer. After a
            mismatch the layer is not resident, and loading raises CorruptCheckpoint.
        digests : mapping, optional
            For each layer's name, its digests as :meth:`digest` returns them. Compare these instead
            of computing digests from the files.

        Raises
        ------
        CorruptCheckpoint
            A file is malformed, or files and index disagree.
        FileNotFoundError
            The checkpoint does not exist.
        ValueError
            The name is invalid or already registered, the cast is not supported, or the layout
            differs from that of the name's other revisions.

        Guarantee: strong (after an exception nothing has changed).
        """
        native = self.native
        bare, named_revision = parse_name(check.text("name", name))
        writable = check.flag("writable", writable)
        if checkpoint is None:
            checkpoint, revision = bare, revision or named_revision
        checkpoint = check.paths("checkpoint", checkpoint)
        origin = Origin(checkpoint, dtype, layers, allow_symlinks, variant, revision, verify)
        with origin.opened(self._granule_bytes, digests) as opened:

            def make() -> Model:
                made = native.register(
                    name,
                    opened.files(),
                    opened.layout.native,
                    writable=writable,
                    checks=opened.checks,
                )
                again = replace(origin, source=anchored(origin.source))
                return Model(made, opened.layout, self._framework, again)

            model = self._models.add(str(name), opened.layout, make)
        log.info(
            "registered %r: %d layers, %s, from %s",
            model.name,
            len(model.layout),
            format_bytes(model.nbytes),
            checkpoint,
        )
        return model

    def reload(
        self,
        model: Model | str,
        *,
        digests: Digests | None = None,
        timeout: float | None = None,
    ) -> None:
        """Reopen a model's files after they were replaced, written or touched.

        Until then loads of the model raise CorruptCheckpoint. The files are those that the model
        was registered from, and their layout must be the same. Addresses, views, keep values and
        the name stay; resident layers are evicted.

        Parameters
        ----------
        model : Model or str
        digests : mapping, optional
            As for :meth:`register`. Default: computed from the new files if the model was
            registered with ``verify``.
        timeout : float, optional
            Seconds to wait for streams that use the model. Default: no limit.

        Raises
        ------
        Busy
            The model is leased.
        TimeoutError
            Streams use the model for longer than ``timeout``.
        ValueError
            The layout has changed.
        CorruptCheckpoint, FileNotFoundError
            As for :meth:`register`.

        Guarantee: strong, except for layers that were evicted.
        """
        found = self.model(model)
        timeout = check.timeout(timeout)
        with found.origin.opened(self._granule_bytes, digests) as opened:
            if differs := difference(opened.layout, found.layout):
                raise ValueError(
                    f"{found.name!r} has another layout now: {differs[0]} instead of {differs[1]}; "
                    "unregister it and register it again"
                )
            self.native.reload(
                found.native, opened.files(), opened.layout.native, opened.checks, timeout
            )
            found.layout = opened.layout
        log.info("reloaded %r", found.name)

    def promote(self, model: Model | str) -> Model | None:
        """Let the bare name stand for this revision from now on.

        Loads and evicts nothing. Leases on the other revision stay valid.

        Parameters
        ----------
        model : Model or str
            The revision, or its full name.

        Returns
        -------
        Model or None
            The revision that the bare name stood for before.

        Raises
        ------
        ValueError
            No such revision is registered.

        Guarantee: atomic.
        """
        before = self._models.promote(model)
        log.info("promoted %r; before: %r", self.model(model).name, before and before.name)
        return before

    def prewarm(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        priority: int = BACKGROUND,
        deadline: float | None = None,
    ) -> Ticket:
        """Start loading the layers that are not resident, in execution order.

        Returns at once. Layers without leases are evicted as room is needed.

        Parameters
        ----------
        model : Model or str
        layers : int, slice, or indices and names, optional
            The layers to load; ``4`` means the first four. Default: all.
        priority : int
            Loads of higher priority run first, and among equals those with the earlier deadline.
        deadline : float, optional
            Seconds from now. Layers that have not arrived by then are cancelled, and the ticket
            raises TimeoutError. Default: none.

        Returns
        -------
        Ticket
            Its ``wait(timeout)`` raises the error of a failed load, ``wait(layer=index)`` waits for
            one layer, and ``cancel()`` keeps the layers that have arrived.

        Raises
        ------
        OutOfDeviceMemory
            The layers can never fit.
        Busy
            The layers do not fit beside those that are leased.
        ValueError
            A layer is unknown or repeated, no layer is named, or the deadline has passed.

        Guarantee: per layer (every layer keeps a defined state, and calling again continues from
        there).
        """
        if deadline is not None and not (deadline := check.seconds("deadline", deadline)):
            raise ValueError("deadline must be more than 0 seconds from now, got 0")
        found = self.model(model)
        chosen, level = layer_indices(found, layers), _priority(priority)
        ticket = Ticket(self.native.prewarm(found.native, chosen, level, deadline), found)
        debug("%s", ticket)
        return ticket

    def swap(self, *, evict: Model | str, load: Model | str, priority: int = FOREGROUND) -> Ticket:
        """Load one model into the granules of another, without creating granules.

        Parameters
        ----------
        evict : Model or str
            The model to evict. It is absent when the ticket is done.
        load : Model or str
        priority : int
            As for :meth:`prewarm`.

        Returns
        -------
        Ticket

        Raises
        ------
        Busy
            ``evict`` is leased, or as for :meth:`prewarm`.
        OutOfDeviceMemory, ValueError
            As for :meth:`prewarm`.
        """
        out, found = self.model(evict), self.model(load)
        ticket = Ticket(self.native.swap(out.native, found.native, _priority(priority)), found)
        debug("%s", ticket)
        return ticket

    def lease(
        self,
        models: Model | str | Sequence[Model | str],
        *,
        layers: Layers | None = None,
        streaming: bool = False,
        timeout: float | None = None,
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

        Raises
        ------
        ValueError, TypeError
            A model or layer is unknown, no model is named, or ``layers`` is given for several
            models.
        """
        if isinstance(models, _ONE_MODEL):
            models = (models,)
        elif not isinstance(models, Iterable):
            self.model(models)  # raises TypeError
        wanted = tuple(dict.fromkeys(self.model(model) for model in models))
        if not wanted:
            raise ValueError("a lease needs at least one model")
        if layers is not None and len(wanted) > 1:
            raise ValueError("layers must be None for several models: lease each model by itself")
        chosen = layer_indices(wanted[0], layers)
        if streaming is not False:
            streaming = check.flag("streaming", streaming)
        if timeout is not None:
            timeout = check.timeout(timeout)
        return Lease(self.native, wanted, chosen, streaming=streaming, timeout=timeout)

    def stamp(
        self, model: Model | str, keep_value: float, *, layer: int | str | None = None
    ) -> None:
        """Set how much a model, or one layer of it, is worth keeping.

        When room is needed, layers with the lowest value are evicted first, and among equals the
        least recently used.

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
        self.native.set_keep_value(
            found.native, check.number("keep_value", keep_value, finite=False), index
        )

    def trim(self) -> int:
        """Give free granules back to the device and return their bytes.

        The runtime creates granules again when it needs them.
        """
        nbytes = self.native.trim()
        log.info("trimmed %s", format_bytes(nbytes))
        return nbytes

    def step(self) -> bool:
        """Load one chunk, or do one step of making room for it; for ``Runtime(pump=True)``.

        Returns False if nothing can be done now. Raises ValueError for a runtime without ``pump``.
        """
        return self.native.step()


def _priority(priority: int) -> int:
    return check.integer("priority", priority, check.INT32_MIN, check.INT32_MAX)
