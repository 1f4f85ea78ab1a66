"""The world of a random program of layers: a runtime under the checking driver, the bytes that
each layer must have, and their comparison."""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from checkpoints import write_safetensors

from warmserve_rt import Model, Runtime, WarmServeError, testing
from warmserve_rt.testing.cuda_api import Cuda

Bytes = npt.NDArray[np.uint8]
KIB = 1 << 10
# The simulated device has small granules, so that more programs run per second.
GRANULES = {"host": 2048 * KIB, "host-staged": 2048 * KIB, "simcuda": 64 * KIB}
SHAPES = {  # granules per layer; "e" is larger than some arenas
    "a": (0.3, 0, 1.4),
    "b": (1, 0.001, 0.6),
    "c": (2.1, 1),
    "d": (0, 1.7),
    "e": (2.5, 0, 1.3, 2),
}
SLAB = 12  # granules of host memory that a stream copies to


class Failed(AssertionError):
    """A program had a wrong result."""


class WrongBytes(Failed):
    """A leased layer has other bytes than the model's."""

    def __init__(self, where: str, count: int, first: int) -> None:
        super().__init__(f"{count} wrong bytes, the first at {first:#x}: {where}")
        self.count, self.first = count, first


def compare(where: str, found: Bytes, wanted: Bytes) -> None:
    if not np.array_equal(found, wanted):
        wrong = np.flatnonzero(found != wanted)
        raise WrongBytes(where, len(wrong), int(wrong[0]))


class Contents:
    """Checkpoints for one device, in two revisions. All layers have different random bytes."""

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.granule = device, GRANULES[device]
        self.layers: dict[tuple[str, int], list[Bytes]] = {}
        self.files: dict[tuple[str, int], Path] = {}
        for name, shape in SHAPES.items():
            for revision in (0, 1):
                rng = np.random.default_rng([ord(name), revision])
                made = [np.frombuffer(rng.bytes(int(x * self.granule)), np.uint8) for x in shape]
                self.layers[name, revision] = made
                self.files[name, revision] = write_safetensors(
                    folder / f"{device}-{name}{revision}",
                    {tensor(i): ("U8", [len(x)], x.tobytes()) for i, x in enumerate(made)},
                )


def tensor(layer: int) -> str:
    return f"model.layers.{layer}.weight"


class Tape:
    """A stream, the copies made on it, and the bytes that they must have once they have run."""

    def __init__(self, stream: Any, memory: Bytes) -> None:
        self.stream = stream
        self._memory, self._used = memory, 0
        self._copies: list[tuple[str, Bytes, Bytes]] = []

    def copy(self, entry: Entry, layer: int) -> None:
        """Copy a layer on the stream.

        Pre-condition: the stream waits for the layer, under a lease that will record the stream.
        """
        wanted = entry.layers[layer]
        nbytes = len(wanted)
        if self._used + nbytes > len(self._memory):
            self.check()
        out = self._memory[self._used : self._used + nbytes]
        self._used += nbytes
        view = entry.model.layer_bytes(layer, 0, nbytes)
        self.stream.copy_from(out, view)
        self._copies.append((f"a copy of {entry} layer {layer}", out, wanted))

    def check(self) -> None:
        self.stream.synchronize()
        for copy in self._copies:
            compare(*copy)
        self._copies.clear()
        self._used = 0


@dataclass(eq=False)
class Entry:
    """One registration of a model."""

    model: Model
    revision: int
    layers: list[Bytes]
    common: Any = None  # a lease that any thread may acquire

    @property
    def streaming(self) -> bool:
        """Return whether the common lease is a streaming one."""
        return self.revision == 1

    def __str__(self) -> str:
        return f"{self.model.name}{self.revision}"


@dataclass
class World:
    runtime: Runtime
    watched: testing.Watched
    contents: Contents
    pump: bool
    names: list[str]
    tapes: list[Tape]
    entries: dict[str, Entry] = field(default_factory=dict)
    forgotten: list[Entry] = field(default_factory=list)  # every entry that was ever registered
    counts: Counter[str] = field(default_factory=Counter)
    failed: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stepped(self) -> bool:
        """Return whether streams advance only when they are stepped or waited for."""
        return self.pump and self.contents.device != "simcuda"

    def count(self, what: str, times: int = 1) -> None:
        with self._lock:
            self.counts[what] += times

    def register(self, name: str, revision: int) -> Entry:
        model = self.runtime.register(name, self.contents.files[name, revision])
        entry = Entry(model, revision, self.contents.layers[name, revision])
        entry.common = self.runtime.lease(model, streaming=entry.streaming)
        self.entries[name] = entry
        self.forgotten.append(entry)
        return entry

    def forget(self) -> None:
        """Drop models, leases and streams, which would keep addresses and streams alive."""
        for entry in self.forgotten:
            del entry.model, entry.common
        for tape in self.tapes:
            del tape.stream

    def states(self, entry: Entry, layers: list[int]) -> list[str]:
        """Return the residency of layers, or an empty list if the model was unregistered."""
        found = self.runtime.snapshot().models.get(entry.model.name)
        return [found.layers[i].residency for i in layers] if found else []

    def fits(self, wants: list[tuple[Entry, int]]) -> bool:
        """Return whether the arena has room for these layers beside all leased layers."""
        snapshot = self.runtime.snapshot()
        wanted = {(entry.model.name, i) for entry, i in wants}
        held = (
            layer.granules
            for name, model in snapshot.models.items()
            for i, layer in enumerate(model.layers)
            if layer.leases or (name, i) in wanted
        )
        return sum(held) <= snapshot.granules

    def read(self, entry: Entry, layer: int) -> None:
        """Compare the bytes of a layer. Pre-condition: the layer is resident and leased."""
        view = entry.model.tensors()[tensor(layer)]
        if not isinstance(view, np.ndarray):
            view = self.runtime.read_back(entry.model, layer)
        self.compare(entry, layer, view)

    def compare(self, entry: Entry, layer: int, found: Bytes) -> None:
        compare(f"{entry} layer {layer}", found, entry.layers[layer])

    def check(self) -> None:
        self.runtime.check_invariants()
        if self.watched.strict.violations:
            raise Failed(str(self.watched.strict.violations))


@contextmanager
def world(seed: int, contents: Contents, *, pump: bool, tapes: int) -> Iterator[World]:
    """Yield a world named by a seed; on a clean exit close it and check the driver's contracts."""
    rng = random.Random(f"world {seed}")
    granule = contents.granule
    chunk = granule * rng.choice([1, 1, 2, 4, 8]) // 4
    with ExitStack() as stack:
        cuda = None
        if contents.device == "simcuda":
            paces = [None, 1e9] if pump else [None, 3e8]
            cuda = stack.enter_context(
                testing.simulated_cuda(
                    clock="virtual" if pump else "real",
                    memory="16MiB",
                    granularity=granule,
                    h2d=rng.choice(paces),
                    d2h=rng.choice(paces),
                )
            )
        watched = testing.watch(pump=pump, host_view=contents.device == "host", cuda=cuda)
        runtime = Runtime(
            driver=watched.driver,
            arena=rng.choice([6, 8, 8]) * granule,
            granule=granule,
            max_padding=1,
            chunk=chunk,
            staging=chunk * rng.choice([1, 2, 3]),
            pump=pump,
            loaders=2,
            poison=rng.random() < 0.2,
            background_share=rng.choice([0.0, 0.05, 0.3, 1.0]),
            host_cache=rng.choice([0, 2, 8]) << 20,
            tensors="dlpack" if cuda else "numpy",
        )
        pinned = stack.enter_context(ExitStack())
        made = World(
            runtime,
            watched,
            contents,
            pump,
            sorted(rng.sample(sorted(SHAPES), rng.randint(3, 5))),
            [Tape(runtime.stream(), _slab(pinned, granule, cuda)) for _ in range(tapes)],
        )
        for name in made.names:
            made.register(name, 0)
        try:
            yield made
            for tape in made.tapes:
                tape.check()
            runtime.close()
        finally:  # also after a failure, because the next program starts its own simulated driver
            with suppress(WarmServeError):
                runtime.close()
            made.forget()
            pinned.close()
        watched.check()


def _slab(stack: ExitStack, granule: int, cuda: testing.SimulatedCuda | None) -> Bytes:
    if not cuda:
        return np.empty(SLAB * granule, np.uint8)
    raw = Cuda(cuda.library).start()
    memory = raw.pinned(SLAB * granule)  # copies to pageable memory would block
    stack.callback(raw.release_primary)
    stack.callback(raw.unregister, memory.address)
    return np.frombuffer(memory.view, np.uint8)
