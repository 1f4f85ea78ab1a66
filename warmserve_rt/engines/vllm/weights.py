"""The weights of engines in an arena: who uses them, who sleeps, and whether they are right."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress

import torch

from warmserve_rt._errors import CorruptCheckpoint, OutOfDeviceMemory, WarmServeError
from warmserve_rt._units import parse_bytes
from warmserve_rt.checkpoint.layout import LayerSpec
from warmserve_rt.core.lease import Lease
from warmserve_rt.core.loading import FOREGROUND
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.core.ticket import Ticket
from warmserve_rt.kernels import granule_digest

from .cache import PIECE, Entry, discard, layers_of, open_for_use


class Arena:
    """A runtime, with a count of the engines that use each of its models. Thread-safe.

    Parameters
    ----------
    runtime : Runtime
        The runtime that owns the memory.
    asked : int or str, optional
        The size that the arena was made with, if it is known.
    """

    def __init__(self, runtime: Runtime, asked: int | str | None = None) -> None:
        self.runtime, self._asked = runtime, asked
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._asleep: Counter[str] = Counter()
        self._verified: set[str] = set()

    @property
    def is_open(self) -> bool:
        return not self.runtime.closed

    @property
    def nbytes(self) -> int:
        return self.runtime.snapshot().arena_bytes

    def unmapped(self, mapped: int) -> int:
        """Return this process's bytes in the arena beyond the ``mapped`` ones."""
        return self.nbytes - mapped

    def is_of(self, size: int | str) -> bool:
        """Return whether ``size`` is the size of this arena."""
        if size == self._asked:
            return True
        with suppress(ValueError):  # a share of the device's memory
            granule = self.runtime.snapshot().granule_bytes
            return -(-parse_bytes(size) // granule) * granule == self.nbytes
        return False

    def add(self, entry: Entry, *, kept: bool = False) -> Weights:
        """Register an entry's weights, or share them with the engines that already use them.

        Parameters
        ----------
        entry : Entry
            The processed weights.
        kept : bool
            The weights stay in the arena until the engine closes them.

        Raises
        ------
        OutOfDeviceMemory
            The weights do not fit, or would leave too little room for another engine.
        FileNotFoundError
            Another process has replaced the entry.

        Notes
        -----
        Admitted weights can always be made resident again: the arena has room for all kept weights
        plus the largest of the others.

        Guarantee: strong (after an exception nothing has changed).
        """
        name = _name_of(entry)
        with self._lock, ExitStack() as undo:
            in_use = open_for_use(entry.weights)
            undo.callback(os.close, in_use)
            known = any(model.name == name for model in self.runtime.models)
            if not known:
                # Grouped here, so that the runtime merges no layers: digests are of each layer.
                layers = {
                    layer.name: [tensor.name for tensor in layer.tensors]
                    for layer in layers_of(entry.weights)
                }
                self.runtime.register(name, entry.weights, layers=layers)
            model = self.runtime.model(name)
            try:
                self._admit(model, kept)
            except BaseException:
                if not known:
                    self.runtime.unregister(model)
                raise
            self._users[name] += 1
            self._kept[name] += kept
            undo.pop_all()
        return Weights(self, model, entry, in_use, kept=kept)

    def _admit(self, model: Model, kept: bool) -> None:
        snapshot = self.runtime.snapshot()
        granules = {
            name: sum(layer.granules for layer in found.layers)
            for name, found in snapshot.models.items()
        }
        held = {name for name, count in self._kept.items() if count} | (
            {model.name} if kept else set()
        )
        stay = sum(granules[name] for name in held)
        users = {name for name, count in self._users.items() if count} | {model.name}
        largest = max((granules[name] for name in users - held), default=0)
        if stay + largest > snapshot.granules:
            unit = snapshot.granule_bytes
            raise OutOfDeviceMemory(
                f"{model.name!r} needs {granules[model.name] * unit} bytes, but of the arena's "
                f"{snapshot.arena_bytes} bytes, engines without a leasing worker keep "
                f"{sum(granules[name] for name in held - {model.name}) * unit}, and the largest of "
                f"the others needs {largest * unit}: make the arena larger"
            )

    def _leave(self, weights: Weights) -> None:
        name = weights.model.name
        with self._lock:
            self._users[name] -= 1
            self._kept[name] -= weights.kept
            self._asleep[name] -= weights.asleep
            if not self._users[name]:
                self._verified.discard(name)
                if self.is_open:  # at process exit the runtime may be closed before the engines
                    self.runtime.unregister(weights.model)
                    self._after_leaving()

    def _after_leaving(self) -> None:
        """Do what follows when no engine uses a model any more. The caller holds the lock."""

    def _sleep(self, weights: Weights) -> None:
        """Mark an engine asleep, and evict its weights unless another engine that shares them is
        awake."""
        name = weights.model.name
        with self._lock:
            asleep = self._asleep[name] + (not weights.asleep)
            if asleep == self._users[name]:
                self._evict(weights.model)
            self._asleep[name] = asleep
            weights.asleep = True

    def _evict(self, model: Model) -> None:
        self.runtime.evict(model)

    def _wake(self, weights: Weights) -> None:
        with self._lock:
            self._asleep[weights.model.name] -= weights.asleep
            weights.asleep = False

    def _is_verified(self, name: str) -> bool:
        return name in self._verified

    def _mark_verified(self, name: str) -> None:
        self._verified.add(name)


def _name_of(entry: Entry) -> str:
    """Return the name of an entry's model, which is the same in all processes.

    An entry that was written again has other files and gets another name: a broker refuses a known
    name with other files.
    """
    return f"{entry.folder.name}-{entry.weights.stem.removeprefix('weights-')}"


class Weights:
    """One engine's weights in an arena."""

    def __init__(
        self, arena: Arena, model: Model, entry: Entry, in_use: int, *, kept: bool
    ) -> None:
        self.arena, self.model, self.kept = arena, model, kept
        self._entry = entry
        self._let_go = weakref.finalize(self, os.close, in_use)
        self._hold: Lease | None = None
        self._closed = False
        self.asleep = False

    @property
    def runtime(self) -> Runtime:
        return self.arena.runtime

    @property
    def digests(self) -> Mapping[str, list[int]]:
        """For each layer, the digests of its pieces of ``PIECE`` bytes as they were written to the
        cache (:func:`kernels.granule_digest`)."""
        return self._entry.digests

    def prewarm(self) -> Ticket:
        """Start loading the missing layers, at foreground priority. Does not block."""
        return self.runtime.prewarm(self.model, priority=FOREGROUND)

    def hold(self) -> None:
        """Lease the weights until :meth:`close`. Blocks until they are resident."""
        if self._hold is None:
            self._hold = self.runtime.lease(self.model).acquire()

    def verify(self) -> None:
        """Wait for each layer and compare its bytes with those written, once in a process.

        Raises CorruptCheckpoint, after the entry was discarded, if a layer differs. Errors of
        loading pass through.
        """
        if self.arena._is_verified(self.model.name):
            return
        layer = self.differing()
        if layer is not None:
            error = CorruptCheckpoint(
                f"{self._entry.weights}: layer {layer.name!r} is not as it was written"
            )
            discard(self._entry, error)
            raise error
        self.arena._mark_verified(self.model.name)

    def differing(self) -> LayerSpec | None:
        """Lease the weights and return the first layer that differs from the written one, or None.

        Blocks until the layers are resident. Errors of loading pass through.
        """
        # Digests and copies are complete when they return: there is no stream to record.
        with self.runtime.lease(self.model, streaming=True, stream=None) as lease:
            for layer in self.model.layers:
                lease.wait(layer.index)
                if self._digest(layer.index) != self.digests.get(layer.name):
                    return layer
        return None

    def _digest(self, layer: int) -> list[int]:
        with suppress(WarmServeError):  # without kernels for this device we read back below
            return [int(each) for each in self.runtime.digest(self.model, layer, piece=PIECE)]
        return [int(x) for x in granule_digest(self.runtime.read_back(self.model, layer), PIECE)]

    def sleep(self) -> None:
        """Evict the weights once all engines that share them sleep.

        A repeated call evicts layers that a prewarm or a lease has loaded meanwhile. Raises Busy,
        with nothing changed, during a step and if the weights are kept.
        """
        self.arena._sleep(self)

    def wake(self) -> None:
        """Load the missing layers. Blocks until all weights are resident."""
        self.prewarm().wait()
        self.arena._wake(self)

    def close(self) -> None:
        """Release the weights' memory in the arena. Idempotent. Raises Busy while a step runs.

        On CUDA, blocks until the device has finished the work of an engine that takes no leases.
        """
        if self._hold is not None:
            if self.arena.is_open:
                self._synchronize()
            self._hold.release()
            self._hold = None
        if not self._closed:
            self._closed = True
            self.arena._leave(self)
            self._let_go()

    def _synchronize(self) -> None:
        """Wait for all work of the CUDA device, because nothing has recorded the streams that an
        engine without a leasing worker uses."""
        tensors = self.model.tensors("torch").values()
        for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
            torch.cuda.synchronize(device)
