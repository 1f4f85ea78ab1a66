"""The arenas of a process: one for each device, which all engines in it share."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress

from warmserve_rt._errors import CorruptCheckpoint, OutOfDeviceMemory, WarmServeError
from warmserve_rt._units import parse_bytes
from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.kernels import granule_digest
from warmserve_rt.layers import LayerSpec, build_layout
from warmserve_rt.lease import Lease
from warmserve_rt.runtime import FOREGROUND, Model, Runtime, Ticket

from .cache import GRANULE, Entry, discard, open_for_use

_arenas: dict[str, Arena] = {}
_owner = os.getpid()
_changes = threading.Lock()


class Arena:
    """A runtime, and which engines use which of its models. Thread-safe."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._lock = threading.Lock()
        self._users: Counter[str] = Counter()
        self._kept: Counter[str] = Counter()
        self._asleep: Counter[str] = Counter()
        self._verified: set[str] = set()

    @property
    def is_open(self) -> bool:
        try:
            return self.runtime.native is not None
        except WarmServeError:
            return False

    @property
    def nbytes(self) -> int:
        return self.runtime.snapshot().arena_bytes

    def add(self, entry: Entry, *, kept: bool = False) -> Weights:
        """Registers an entry's weights, or joins the engines that have just these.

        ``kept``: they will never leave. Raises OutOfDeviceMemory, with nothing changed, where they
        do not fit, or would leave too little room for another engine: what is admitted can always
        be made resident again. FileNotFoundError: the entry was replaced meanwhile.
        """
        name = f"{entry.folder.name}-{entry.identity[:12]}".replace("@", "-")
        with self._lock, ExitStack() as undo:
            in_use = open_for_use(entry.weights)
            undo.callback(os.close, in_use)
            known = any(model.name == name for model in self.runtime.models)
            if not known:
                self.runtime.register(name, entry.weights)
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
                f"{snapshot.arena_bytes} engines without a leasing worker keep "
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
                if self.is_open:  # at the end of a process it may be closed before its engines
                    self.runtime.unregister(weights.model)

    def _sleep(self, weights: Weights) -> None:
        name = weights.model.name
        with self._lock:
            if self._asleep[name] + 1 == self._users[name]:
                self.runtime.evict(weights.model)
            self._asleep[name] += 1

    def _wake(self, weights: Weights) -> None:
        with self._lock:
            self._asleep[weights.model.name] -= 1

    def _is_verified(self, name: str) -> bool:
        return name in self._verified

    def _mark_verified(self, name: str) -> None:
        self._verified.add(name)


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
        """By layer, of each granule as it was written (:func:`kernels.granule_digest`)."""
        return self._entry.digests

    def prewarm(self) -> Ticket:
        """Begins to bring in what is missing."""
        return self.runtime.prewarm(self.model, priority=FOREGROUND)

    def hold(self) -> None:
        """Leases them until :meth:`close`."""
        if self._hold is None:
            self._hold = self.runtime.lease(self.model).acquire()

    def verify(self) -> None:
        """Waits for each layer and compares what arrived with what was written, once in a process.
        Raises CorruptCheckpoint, where the entry is forgotten, and what loading raises."""
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
        """Leases all, and returns the first layer that is not as it was written, if there is one.
        Raises what loading raises."""
        same_granules = self.runtime.snapshot().granule_bytes == GRANULE
        with self.runtime.lease(self.model, streaming=True) as lease:
            for layer in self.model.layers:
                lease.wait(layer.index)
                if self._digest(layer.index, same_granules) != self.digests.get(layer.name):
                    return layer
        return None

    def _digest(self, layer: int, same_granules: bool) -> list[int]:
        if same_granules:
            with suppress(WarmServeError):  # no kernels for this device
                return [int(each) for each in self.runtime.digest(self.model, layer)]
        return [int(x) for x in granule_digest(self.runtime.read_back(self.model, layer), GRANULE)]

    def sleep(self) -> None:
        """Leaves the arena to others, when all engines with these weights sleep; idempotent.
        Raises Busy while a step runs, or where they are kept."""
        if not self.asleep:
            self.arena._sleep(self)
            self.asleep = True

    def wake(self) -> None:
        """Returns when all is there."""
        self.prewarm().wait()
        if self.asleep:
            self.arena._wake(self)
            self.asleep = False

    def close(self) -> None:
        """Gives the room back; idempotent. Raises Busy while a step runs."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None
        if not self._closed:
            self._closed = True
            self.arena._leave(self)
            self._let_go()


def use(runtime: Runtime, device: str = "host") -> None:
    """Makes a runtime the arena of this process's engines on ``device``. Raises ValueError where
    there is one already."""
    with _changes:
        _forget_parents()
        if device in _arenas:
            raise ValueError(f"this process has an arena on {device!r} already")
        _arenas[device] = Arena(runtime)


def find(device: str) -> Arena | None:
    """This process's arena on a device, if it has one that is open."""
    with _changes:
        _forget_parents()
        return _arenas.get(device)


def obtain(device: str, size: int | str | None, entry: Entry | None = None) -> Arena | None:
    """This process's arena on a device; made now, of ``size`` or as large as an entry, if there is
    none. None where neither is given.

    Raises ValueError for one of another size than is there, and what :class:`Runtime` raises.
    """
    with _changes:
        _forget_parents()
        found = _arenas.get(device)
        if found is not None:
            if size is not None and -(-parse_bytes(size) // GRANULE) * GRANULE != found.nbytes:
                raise ValueError(
                    f"an arena of {size} on {device!r}, where this process has one of "
                    f"{found.nbytes} bytes, which all its engines share"
                )
            return found
        if size is None and entry is None:
            return None
        wanted = parse_bytes(size) if size is not None else _needed(entry)
        _arenas[device] = Arena(Runtime(device, arena=wanted, tensors="torch"))
        return _arenas[device]


def _needed(entry: Entry | None) -> int:
    assert entry is not None
    with closing(open_checkpoint(entry.weights)) as opened:
        layers = build_layout(opened).layers
    return sum(-(-layer.nbytes // GRANULE) * GRANULE for layer in layers)


def _forget_parents() -> None:
    """A forked child cannot use what its parent had, and those that were closed nobody can."""
    global _owner
    if _owner != os.getpid():
        _owner = os.getpid()
        _arenas.clear()
    for device, arena in list(_arenas.items()):
        if not arena.is_open:
            del _arenas[device]
