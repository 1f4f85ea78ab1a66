"""E6: ways to read the page cache."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from time import perf_counter

from lib.cuda import Gpu
from lib.harness import GIB, MIB
from parts.gpu.host_memory import POPULATE_READ, anonymous, mapped, touch, write_random
from parts.gpu.part import Part

from . import experiment
from .channel import child
from .tools import Traffic, together

_SLICE = MIB
_RING = 4  # slices of a thread, which stay in the caches of its core
_CHUNK = 8 * MIB
_THREADS = (8, 12, 16)
_BETTER = 1.1  # times the rate of chunks that make another way worth its code
# The least size from which the C library copies past the caches.
PAST_CACHES = {"GLIBC_TUNABLES": "glibc.cpu.x86_non_temporal_threshold=0x10000"}


@cache
def _mapping(path: Path) -> int:
    """Return the address of a file that is mapped for reading and populated."""
    nbytes = path.stat().st_size
    with path.open("rb") as file:
        address = mapped(nbytes, mmap.MAP_SHARED, file.fileno(), mmap.PROT_READ)
    touch(address, nbytes, POPULATE_READ)
    return address


@cache
def _buffers(way: str, thread: int) -> list[int]:
    """Return the memory of a thread, by the addresses of its pieces."""
    _, piece, count = _WAYS[way]
    address = anonymous(count * piece)
    return [address + number * piece for number in range(count)]


def _reading(path: Path, piece: int) -> Callable[[int, int], object]:
    """Return a function that reads a piece of a file to an address."""
    descriptor = os.open(path, os.O_RDONLY)  # until the process ends

    def move(place: int, to: int) -> None:
        view = memoryview((ctypes.c_char * piece).from_address(to)).cast("B")
        if os.preadv(descriptor, [view], place) != piece:
            raise OSError(f"short read at byte {place} of {path}")

    return move


def _copying(path: Path, piece: int) -> Callable[[int, int], object]:
    """Return a function that copies a piece of a file's mapping to an address."""
    begin = _mapping(path)
    return lambda place, to: ctypes.memmove(to, begin + place, piece)


# Each way: the function, the bytes of a piece, and the pieces of a thread's memory.
_WAYS = {
    "chunks": (_reading, _CHUNK, 4),
    "rings": (_reading, _SLICE, _RING),
    "past_caches": (_copying, _CHUNK, 4),
}


def rate(way: str, path: Path, threads: int, time: float) -> float:
    """Return GB/s of all threads together; each begins at another place of the file."""
    work, piece, _ = _WAYS[way]
    pieces = path.stat().st_size // piece
    move = work(path, piece)

    def body(number: int, buffers: list[int]) -> float:
        done, begin = 0, perf_counter()
        while perf_counter() < begin + time:
            place = (number * pieces // threads + done) % pieces * piece
            move(place, buffers[done % len(buffers)])
            done += 1
        return done * piece / (perf_counter() - begin)

    works = [partial(body, number, _buffers(way, number)) for number in range(threads)]
    return sum(together(works)) / 1e9


@contextmanager
def _file(part: Part, nbytes: int) -> Iterator[Path]:
    path = part.folder / "page_cache"
    with path.open("wb") as file:
        write_random(file, nbytes)
    yield path
    path.unlink()


@experiment("E6")
def page_cache(part: Part) -> None:
    """Decide how loaders should read the page cache.

    Expected: 31 to 36 GB/s in chunks of 8 MiB; 38 to 45 in slices of 1 MiB, which stay in a core's
    cache and are not written to memory; 40 to 48 by stores past the caches, which read no target.
    """
    counts = [count for count in _THREADS if count <= len(os.sched_getaffinity(0))] or [2]
    traffic = Traffic(Gpu(), 16 * MIB, part.scale(256, 16) * MIB)
    time = part.scale(0.5, 0.05)
    found: dict[str, float] = {}
    with _file(part, part.scale(2 * GIB, 32 * MIB)) as path:
        for way, count in itertools.product(_WAYS, counts):
            with (
                part.question(f"{way} with {count} threads"),
                _reader(way, path, count) as gb_per_s,
            ):
                part.row(f"{way}_alone_x{count}_gb_per_s", gb_per_s(time), "GB/s")
                with traffic:
                    beside = gb_per_s(time)
                part.row(f"{way}_beside_copies_x{count}_gb_per_s", beside, "GB/s")
                part.row(f"copies_beside_{way}_x{count}_gb_per_s", traffic.gb_per_s, "GB/s")
                found[way] = max(found.get(way, 0.0), beside)
    for way in ("rings", "past_caches"):
        if way in found and "chunks" in found:
            gain = found[way] / found["chunks"]
            verdict = "is worth its code" if gain >= _BETTER else "gains too little"
            part.decide(
                f"reading by {way.replace('_', ' ')} {verdict}: {gain:.2f} times as fast as by "
                "chunks, beside copies"
            )


@contextmanager
def _reader(way: str, path: Path, threads: int) -> Iterator[Callable[[float], float]]:
    """Yield a function that reads for some seconds and returns GB/s.

    Only the start of a process can set from which size on its C library copies past the caches.
    """
    if way != "past_caches":
        yield partial(rate, way, path, threads)
        return
    with child("reads", PAST_CACHES) as channel:
        channel.expect("runs")

        def remote(time: float) -> float:
            channel.send([way, str(path), threads, time])
            return float(channel.receive()[0])

        remote(0)  # maps the file
        yield remote
