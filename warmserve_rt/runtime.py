"""The runtime that a serving engine imports."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import _native
from ._errors import WarmServeError
from ._units import parse_bytes
from .checkpoint import Source
from .devices import arena_bytes, loader_count
from .layers import Grouping
from .lease import Lease
from .model import Model
from .paths import Path, open_devices
from .registration import Digests, Origin, Verify, anchored
from .revisions import Revisions, difference, parse_name
from .selection import Layers, all_but, layer_index, layer_indices
from .snapshot import Snapshot
from .views import Framework, checked_framework

__all__ = ["BACKGROUND", "FOREGROUND", "Model", "Runtime", "Ticket"]

BACKGROUND, FOREGROUND = 0, 100
Ticket = _native.Ticket


class Runtime:
    """One device's memory, shared by many models.

    ``device``: "host", "cuda" or "cuda:N". ``arena``: bytes of device memory it owns, all taken at
    once. ``headroom``: bytes of the device's memory that are left to others (torch's activations,
    KV caches): the arena is refused, and later not grown back, where less would be free; with no
    ``arena`` given it is all that is free beside the headroom, and with neither 2 GiB.
    ``staging``: the most pinned host memory it takes, in chunks of ``chunk`` bytes (unused where
    the CPU reaches the device's memory). ``granule``: bytes, a multiple of the device's
    granularity; a GPU maps one of 8 MiB as fast as one of 2, but every layer takes whole ones.
    ``loaders``: threads that load; by default one for each CPU but one, eight at the most.
    ``staging_timeout``: seconds that a load waits for a chunk before it fails with StagingTimeout.
    ``pump``: no threads at all, and :meth:`step` does the work. ``poison``: evicted addresses read
    as NaN, and do not fault, for debugging. ``background_share``: of the bytes that move while
    foreground loads wait, what work of priority BACKGROUND or less gets; it gets so much and no
    more, and all when nobody else wants it. ``read_bandwidth``: bytes a second (or "1GiB") that all
    loads together read at most. ``tensors``: what leases hand out, "torch", "numpy" (on the host),
    "cupy" (on CUDA) or "dlpack" (objects with ``__dlpack__``, ``address`` and ``nbytes``); by
    default torch where it is installed, else numpy or cupy. ``driver``: the device itself, for
    tests. ``paths``: neighbours ("cuda:1") whose host links its foreground loads may use too; each
    gives four chunks of its memory (:mod:`warmserve_rt.paths`).

    Sizes are bytes or strings such as ``"2GiB"``. Raises ValueError (a device that is not there, an
    option that makes no sense), OutOfDeviceMemory, and WarmServeError where the device cannot be
    used, saying what to do. Once the device is lost (a CUDA context that died), whatever needs it
    raises DeviceLost; releasing, snapshots and :meth:`close` go on working.

    Thread-safe. Not usable in a forked child, where every method raises WarmServeError and the
    model's addresses are not mapped at all.
    """

    def __init__(
        self,
        device: str = "host",
        arena: int | str | None = None,
        staging: int | str = "256MiB",
        *,
        headroom: int | str | None = None,
        granule: int | str = "2MiB",
        chunk: int | str = "8MiB",
        loaders: int | None = None,
        staging_timeout: float = 30.0,
        pump: bool = False,
        poison: bool = False,
        background_share: float = 0.05,
        read_bandwidth: int | str | None = None,
        tensors: Framework | None = None,
        driver: _native.Driver | None = None,
        paths: Sequence[Path] = (),
    ) -> None:
        threads = loader_count(loaders, pump=pump)
        if not 0 <= background_share <= 1:
            raise ValueError(f"a background share of {background_share}: it is from 0 to 1")
        bandwidth = 0 if read_bandwidth is None else parse_bytes(read_bandwidth)
        if read_bandwidth is not None and bandwidth < 1:
            raise ValueError("a read bandwidth of nothing")
        driver, neighbours = open_devices(device, driver, paths, pump=pump)
        spare = None if headroom is None else parse_bytes(headroom)
        granule = parse_bytes(granule)
        asked = None if arena is None else parse_bytes(arena)
        self._granule_bytes = granule
        self._framework = checked_framework(tensors, cuda=driver.cuda_ordinal >= 0)
        self._models = Revisions()
        self._open: _native.Runtime | None = _native.Runtime(
            driver,
            arena=arena_bytes(driver, asked, spare, max(granule, 1), poison=poison),
            staging=parse_bytes(staging),
            granule=granule,
            chunk=parse_bytes(chunk),
            headroom=spare or 0,
            loaders=threads,
            staging_timeout=staging_timeout,
            poison=poison,
            background_share=background_share,
            read_bandwidth=bandwidth,
            neighbours=neighbours,
        )
        _runtimes.add(self)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Evicts everything and gives all memory back; idempotent. Raises Busy while anything is
        leased. Views that outlive it keep their addresses, with nothing behind them."""
        if self._open is None:
            return
        self._open.close()
        self._open = None
        self._models.clear()

    @property
    def native(self) -> _native.Runtime:
        """The native runtime; raises WarmServeError when this one is closed."""
        if self._open is None:
            raise WarmServeError("the runtime is closed")
        return self._open

    @property
    def models(self) -> tuple[Model, ...]:
        return tuple(self._models.values())

    def register(
        self,
        name: str,
        checkpoint: Source | None = None,
        *,
        dtype: str | Mapping[str, str] | None = None,
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
        ``dtype``: "bfloat16", "float16" or "float32", to which plain floating-point weights are
        cast as they are loaded, or such a name for each of some tensors; quantised tensors, and the
        floats that belong to them, stay as they are (:func:`dtypes.planned_casts`).
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
        bare, named_revision = parse_name(name)
        if checkpoint is None:
            checkpoint, revision = bare, revision or named_revision
        origin = Origin(checkpoint, dtype, layers, allow_symlinks, variant, revision, verify)
        with origin.opened(self._granule_bytes, digests) as opened:

            def make() -> Model:
                made = native.register(
                    name, opened.files(), opened.layers(), writable=writable, checks=opened.checks
                )
                again = replace(origin, source=anchored(origin.source))
                return Model(made, opened.layout, self._framework, again)

            return self._models.add(name, opened.layout, make)

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
        with found.origin.opened(self._granule_bytes, digests) as opened:
            if differs := difference(opened.layout, found.layout):
                raise ValueError(
                    f"{found.name!r} has another layout now: {differs[0]}, and had {differs[1]}; "
                    "unregister it and register it again"
                )
            self.native.reload(
                found.native, opened.files(), opened.layers(), opened.checks, timeout
            )
            found.layout = opened.layout

    def unregister(self, model: Model | str, *, timeout: float | None = None) -> None:
        """Evicts a model and forgets it. Views of it keep their addresses, with nothing behind.
        A bare name that stood for it is unknown until the next :meth:`promote` or registration.
        Raises as :meth:`evict`."""
        found = self.model(model)
        self.native.unregister(found.native, timeout)
        self._models.remove(found)

    def model(self, model: Model | str) -> Model:
        """The registered model of that full name, or that a bare name stands for now, or itself.
        Raises ValueError."""
        return self._models.find(model)

    def promote(self, model: Model | str) -> Model | None:
        """From now on the bare name stands for this revision, given by its full name or itself;
        returns the model it stood for before. Nothing is loaded or evicted, and leases on the
        other go on. Atomic. Raises ValueError."""
        return self._models.promote(model)

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
        if deadline is not None and not deadline > 0:
            raise ValueError(f"a deadline {deadline} seconds from now has passed")
        found = self.model(model)
        return self.native.prewarm(found.native, layer_indices(found, layers), priority, deadline)

    def swap(self, *, evict: Model | str, load: Model | str, priority: int = FOREGROUND) -> Ticket:
        """Loads one model in the granules of another, which is absent when the ticket is done.
        Creates no granules. Raises as :meth:`prewarm`, and Busy while ``evict`` is leased."""
        return self.native.swap(self.model(evict).native, self.model(load).native, priority)

    def evict(
        self,
        model: Model | str,
        *,
        layers: Layers | None = None,
        keep: Layers | None = None,
        wait: Literal["nothing", "streams", "leases"] = "streams",
        timeout: float | None = None,
    ) -> None:
        """Takes a model out of the arena, or these ``layers`` of it, or all but those to ``keep``.

        What is loading them is called off; tickets that want other layers too go on to those, and
        raise Cancelled at the end. ``wait`` says for what: "streams" that were recorded and still
        use the layers, with Busy where they are leased; also for those "leases" to end; or for
        "nothing", with Busy in either case. Raises TimeoutError after ``timeout`` seconds, and
        ValueError as :meth:`prewarm`. Per layer.
        """
        found = self.model(model)
        chosen = layer_indices(found, layers)
        if keep is not None:
            if layers is not None:
                raise ValueError("either the layers to evict, or those to keep")
            chosen = all_but(found, keep)
            if not chosen:
                return
        self.native.evict(found.native, chosen, timeout, wait)

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
        if isinstance(models, str | Model):
            models = (models,)
        wanted = tuple(dict.fromkeys(self.model(model) for model in models))
        if not wanted:
            raise ValueError("a lease on no model")
        if layers is not None and len(wanted) > 1:
            raise ValueError("layers of several models: lease each model by itself")
        chosen = layer_indices(wanted[0], layers)
        return Lease(self.native, wanted, chosen, streaming=streaming, timeout=timeout)

    def stamp(
        self, model: Model | str, keep_value: float, *, layer: int | str | None = None
    ) -> None:
        """How much a model, or one layer of it, is worth keeping: the lowest goes first when room
        is needed, and of equals (0.0 at first) the least recently used. Wait-free."""
        found = self.model(model)
        index = None if layer is None else layer_index(found, layer)
        self.native.stamp(found.native, keep_value, index)

    def trim(self) -> int:
        """Gives free granules back to the device; they are made again when needed. Returns the
        bytes given back."""
        return self.native.trim()

    def tensors(self, model: Model | str) -> dict[str, Any]:
        """See :meth:`Model.tensors`."""
        return self.model(model).tensors()

    def read_back(self, model: Model | str, layer: int | str) -> npt.NDArray[np.uint8]:
        """A copy of a resident layer's bytes, as the device has them: shape ``(layer.nbytes,)``.
        Raises StaleView unless it is resident, ValueError for an unknown layer."""
        found = self.model(model)
        index = layer_index(found, layer)
        out = np.empty(found.layers[index].nbytes, np.uint8)
        self.native.read_back(found.native, index, out)
        return out

    def digest(self, model: Model | str, layer: int | str) -> npt.NDArray[np.uint64]:
        """A digest of each granule of a resident layer, made on the device: as
        :func:`kernels.granule_digest` of its bytes, shape ``(granules,)``. Raises as
        :meth:`read_back`, and WarmServeError where there are no kernels for the device."""
        found = self.model(model)
        return np.array(self.native.digest(found.native, layer_index(found, layer)), np.uint64)

    def device_memory(self) -> tuple[int, int]:
        """Bytes of the device that nobody has, and in all: what is left for the rest of the
        process, of which this runtime never takes the last ``headroom``. Zeros: it does not say."""
        return self.native.device_memory()

    def fileno(self) -> int:
        """An eventfd, readable when a backing epoch has changed since it was last read: graph and
        collective registrations of memory can then be renewed. The runtime's; do not close it."""
        return self.native.fileno()

    def snapshot(self) -> Snapshot:
        """What is where now, as plain values."""
        return Snapshot.of(self.native)

    def stream(
        self, priority: Literal["background", "normal", "urgent"] = "normal"
    ) -> _native.Stream:
        """A new stream of the device: work in order, beside the caller's. ``priority`` is a hint
        for kernels; copies may not heed it. ``torch.cuda.ExternalStream(stream.handle)`` is the
        same stream for torch, as long as this object lives."""
        return self.native.stream(priority)

    def step(self) -> bool:
        """With ``pump``: one chunk of one transfer. False when there is nothing to do."""
        return self.native.step()

    def check_invariants(self) -> None:
        """Raises WarmServeError, naming the first thing wrong in the runtime's books."""
        self.native.check_invariants()


# What is open when the interpreter exits is closed; what cannot be closed is left to the process.
_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for runtime in list(_runtimes):
        with suppress(WarmServeError):
            runtime.close()
    _native.process_exits()
