"""Code of several experiments: threads, copies in the background, mapping again and again."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import TypeVar

from lib.cuda import Gpu
from lib.harness import MIB, seconds
from warmserve_rt.testing.cuda_api import READ_WRITE

T = TypeVar("T")
EVENT = 3  # flags: a wait sleeps, no timing


def together(works: Sequence[Callable[[], T]], cuda: Gpu | None = None) -> list[T]:
    """Run functions at the same time, each on a thread; return their results.

    With a device, its context is current on the threads.
    """
    context = cuda.current() if cuda else 0
    results: dict[int, T] = {}
    errors: list[BaseException] = []
    begin = threading.Barrier(len(works))

    def body(number: int) -> None:
        try:
            if cuda:
                cuda.set_current(context)
            begin.wait(10)
            results[number] = works[number]()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=body, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(works))]


def share_below(samples: Sequence[float], share: float) -> float:
    """Return the sample that this share of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def speed(
    cuda: Gpu, address: int, host: int, sizes: tuple[int, int], piece: int, streams: int = 1
) -> float:
    """Return GB/s of copies to the device in pieces of this size, which the streams share.

    `sizes` are the bytes at either end, and the bytes to copy for one time.
    """
    region, total = sizes
    made = [cuda.stream() for _ in range(streams)]

    def once() -> None:
        for number, at in enumerate(range(0, total, piece)):
            place = at % region
            nbytes = min(piece, region - place)
            cuda.htod(address + place, host + place, nbytes, made[number % streams])
        for stream in made:
            cuda.synchronize(stream)

    once()
    return total / statistics.median(seconds(once) for _ in range(3)) / 1e9


class Traffic:
    """Copies from pinned memory to the device without a pause, while the context manager is open.

    It may be opened again. `gb_per_s` is their rate, known at the end.
    """

    def __init__(self, cuda: Gpu, piece: int, nbytes: int = 256 * MIB) -> None:
        self._cuda, self._piece, self._nbytes = cuda, piece, nbytes
        self._host, self._address = cuda.pinned(nbytes, b"x" * nbytes), cuda.mapped(nbytes)
        self._errors: list[BaseException] = []
        self.gb_per_s = 0.0

    def __enter__(self) -> Traffic:
        self._stop, self._flows = threading.Event(), threading.Event()
        self._context = self._cuda.current()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        self._flows.wait(10)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        if self._errors and not error[0]:
            raise self._errors[0]

    def _run(self) -> None:
        try:
            self._copy()
        except BaseException as error:
            self._errors.append(error)
        finally:
            self._flows.set()

    def _copy(self) -> None:
        """Keep one or two rounds of copies enqueued."""
        cuda = self._cuda
        cuda.set_current(self._context)
        stream, events, rounds = cuda.stream(), [cuda.event(EVENT), cuda.event(EVENT)], 0
        begin = perf_counter()
        while not self._stop.is_set():
            cuda.event_synchronize(events[rounds % 2])
            for at in range(0, self._nbytes, self._piece):
                nbytes = min(self._piece, self._nbytes - at)
                cuda.htod(self._address + at, self._host.address + at, nbytes, stream)
            cuda.record(events[rounds % 2], stream)
            rounds += 1
            self._flows.set()
        cuda.synchronize(stream)
        self.gb_per_s = rounds * self._nbytes / (perf_counter() - begin) / 1e9


class Cycle:
    """Addresses and granules of one thread, which it maps, makes accessible and unmaps."""

    def __init__(self, cuda: Gpu, granule: int, count: int) -> None:
        self.cuda, self.granule, self.count = cuda, granule, count
        self.nbytes = count * granule
        self.address = cuda.reserve(self.nbytes)
        self.handles = [cuda.create(granule) for _ in range(count)]

    def map(self) -> None:
        for number, handle in enumerate(self.handles):
            self.cuda.map(self.address + number * self.granule, self.granule, handle)

    def once(self) -> None:
        self.map()
        self.cuda.set_access(self.address, self.nbytes, READ_WRITE)
        self.cuda.unmap(self.address, self.nbytes)

    def during(self, time: float) -> float:
        """Repeat for this time; return granules per second."""
        begin, granules = perf_counter(), 0
        while (now := perf_counter()) < begin + time:
            self.once()
            granules += self.count
        return granules / (now - begin)

    def free(self) -> None:
        for handle in self.handles:
            self.cuda.release(handle)
        self.cuda.address_free(self.address, self.nbytes)
