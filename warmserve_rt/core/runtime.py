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

    Sizes are bytes, or strings such as "2GiB" (1024s) and "2GB" (1000s).

    ``device``: "host", "cuda" or "cuda:N".
    ``arena``: bytes of device memory to own, all taken at once; "50%" is of the device's memory. By
    default 2 GiB, or all that is free beside ``headroom``, if that is given.
    ``headroom``: bytes of the device's memory, or a share of it, to leave to others (torch's
    activations, KV caches). The arena is refused, and later not grown back, if less would be free.
    ``staging``: the most pinned host memory to take, in chunks of ``chunk`` bytes; "5%" is of the
    machine's memory. Unused if the CPU reaches the device's memory.
    ``granule``: bytes, a multiple of the device's granularity. A GPU maps one of 8 MiB as fast as
    one of 2, but every layer takes whole ones.
    ``loaders``: threads that load; by default one for each CPU but one, at most eight.
    ``staging_timeout``: seconds that a load waits for a chunk before it fails with StagingTimeout.
    ``pump``: start no threads; :meth:`step` does the work.
    ``poison``: evicted addresses read as NaN and do not fault, for debugging.
    ``background_share``: the share of the bytes that work of priority BACKGROUND or less gets while
    foreground loads wait: at most that much, and all when nobody else wants it.
    ``read_bandwidth``: bytes a second (or "1GiB") that all loads together read at most.
    ``tensors``: what leases hand out: "torch", "numpy" (on the host), "cupy" (on CUDA) or "dlpack"
    (objects with ``__dlpack__``, ``address`` and ``nbytes``). By default torch if it is installed,
    else numpy or cupy.
    ``driver``: the device itself, for tests.
    ``paths``: neighbours ("cuda:1") whose host links foreground loads may use too; each gives four
    chunks of its memory (:mod:`warmserve_rt.core.routes`).

    Raises ValueError and TypeError (an unknown device, an invalid option), OutOfDeviceMemory, and
    WarmServeError if the device cannot be used, saying what to do. Once the device is lost (a CUDA
    context that died), all that needs it raises DeviceLost; releasing, snapshots and :meth:`close`
    go on working.

    A context manager, also of ``async with``, that closes the runtime at its end. Thread-safe. Not
    usable in a forked child: there every method raises WarmServeError, and the models' addresses
    are not mapped.
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
        """Makes a model known; loads nothing. Its files stay open until it is unregistered.

        ``name``: "chat", or "chat@2" for a revision, a model of its own beside the others. The
        bare name stands for the first registered, until :meth:`promote`.
        ``checkpoint``: a safetensors file, a Hugging Face directory, a list of files, or the id of
        a model in the Hugging Face cache ("org/name"), of its ``revision``; by default ``name``,
        so that ``register("org/name")`` is enough. ``variant``: "fp16" takes a directory's
        model.fp16.safetensors instead of model.safetensors.
        ``dtype``: "bfloat16", "float16" or "float32" (or torch's or numpy's dtype), to which plain
        floating-point weights are cast as they are loaded, or one for each of some tensors by name;
        quantised tensors, and the floats that belong to them, stay as they are
        (:func:`dtypes.planned_casts`).
        ``layers``: how tensors form layers, where their names do not tell; see
        :func:`layers.build_layout`. ``writable``: in-place writes are allowed and are lost at
        eviction; otherwise they fault. ``allow_symlinks``: a directory's files may be links that
        leave it; those of the Hugging Face cache need no leave.

        ``verify``: "full" takes a digest of every granule now, which reads the files, and compares
        it after each load of a layer; "sampled" does so for some granules of each layer. A mismatch
        is CorruptCheckpoint, and the layer is not resident. ``digests``: compare these instead of
        taking them: by a layer's name, what :meth:`digest` gives.

        Raises CorruptCheckpoint, FileNotFoundError, ValueError (an invalid or duplicate name, an
        unknown cast, a layout that is not that of the name's other revisions). Strong.
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
        """Takes a model as its files are now: opens again what it was registered from.

        For a checkpoint that was replaced, written, or touched: until then its loads raise
        CorruptCheckpoint. The layout must be the same. Addresses, views, keep values and the name
        stay; resident layers are evicted. Digests are taken anew if the model was registered with
        ``verify``, or are these ``digests``. Raises as :meth:`register`, Busy while the model is
        leased, and TimeoutError if streams use it for longer than ``timeout``. Strong, except for
        what was evicted.
        """
        found = self.model(model)
        timeout = check.timeout(timeout)
        with found.origin.opened(self._granule_bytes, digests) as opened:
            if differs := difference(opened.layout, found.layout):
                raise ValueError(
                    f"{found.name!r} has another layout now: {differs[0]}, and had {differs[1]}; "
                    "unregister it and register it again"
                )
            self.native.reload(
                found.native, opened.files(), opened.layout.native, opened.checks, timeout
            )
            found.layout = opened.layout
        log.info("reloaded %r", found.name)

    def promote(self, model: Model | str) -> Model | None:
        """From now on the bare name stands for this revision, given by its full name or itself;
        returns the model it stood for before. Nothing is loaded or evicted, and leases on the
        other go on. Atomic. Raises ValueError."""
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
        """Begins to load what is not resident of these layers, by default all; returns at once.

        What has to go is evicted as room is needed, never anything leased. Layers come in execution
        order. Higher ``priority`` goes first, then the earlier ``deadline``: seconds from now, when
        what has not arrived is given up and the ticket raises TimeoutError. Raises
        OutOfDeviceMemory (it could never fit), Busy (not beside what is leased), ValueError
        (unknown or repeated layers, none at all, a deadline that has passed). The ticket's
        ``wait(timeout)`` raises what loading raised, ``wait(layer=index)`` waits for one layer, and
        ``cancel()`` leaves the layers that arrived. Per layer.
        """
        if deadline is not None and not (deadline := check.seconds("deadline", deadline)):
            raise ValueError("deadline must be more than 0 seconds from now, got 0")
        found = self.model(model)
        chosen, level = layer_indices(found, layers), _priority(priority)
        ticket = Ticket(self.native.prewarm(found.native, chosen, level, deadline), found)
        debug("%s", ticket)
        return ticket

    def swap(self, *, evict: Model | str, load: Model | str, priority: int = FOREGROUND) -> Ticket:
        """Loads one model in the granules of another, which is absent when the ticket is done.
        Creates no granules. Raises as :meth:`prewarm`, and Busy while ``evict`` is leased."""
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
        """A lease on one model, on some ``layers`` of one, or on several models all or nothing; not
        yet acquired. With ``streaming`` it begins while layers are still on their way:
        :meth:`Lease.wait` says when each is there. ``timeout`` in seconds, for each acquisition.
        See :class:`Lease`."""
        if isinstance(models, _ONE_MODEL):
            models = (models,)
        elif not isinstance(models, Iterable):
            self.model(models)  # raises TypeError
        wanted = tuple(dict.fromkeys(self.model(model) for model in models))
        if not wanted:
            raise ValueError("a lease on no model")
        if layers is not None and len(wanted) > 1:
            raise ValueError("layers of several models: lease each model by itself")
        chosen = layer_indices(wanted[0], layers)
        if streaming is not False:
            streaming = check.flag("streaming", streaming)
        if timeout is not None:
            timeout = check.timeout(timeout)
        return Lease(self.native, wanted, chosen, streaming=streaming, timeout=timeout)

    def stamp(
        self, model: Model | str, keep_value: float, *, layer: int | str | None = None
    ) -> None:
        """How much a model, or one layer of it, is worth keeping: the lowest goes first when room
        is needed, and of equals (0.0 at first) the least recently used. Wait-free."""
        found = self.model(model)
        index = None if layer is None else layer_index(found, layer)
        self.native.stamp(found.native, check.number("keep_value", keep_value, finite=False), index)

    def trim(self) -> int:
        """Gives free granules back to the device; they are made again when needed. Returns the
        bytes given back."""
        nbytes = self.native.trim()
        log.info("trimmed %s", format_bytes(nbytes))
        return nbytes

    def step(self) -> bool:
        """With ``pump``: one chunk of one transfer. False when there is nothing to do."""
        return self.native.step()


def _priority(priority: int) -> int:
    return check.integer("priority", priority, check.INT32_MIN, check.INT32_MAX)
