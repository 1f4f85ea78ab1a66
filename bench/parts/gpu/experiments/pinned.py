"""E4 and E5: kinds of pinned memory, how fast they are copied from, and what pinning them costs."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lib.cuda import CudaError, Gpu, NotRun
from lib.harness import GIB, MIB, seconds
from parts.gpu.host_memory import anonymous, nodes, page_cache, shared
from parts.gpu.part import Part

from . import experiment
from .tools import speed, together

_READ_ONLY = 8  # flag of a registration
_ROUNDS = 3
_AS_FAST = 0.95  # share of the fastest
_LOADERS = 36.0  # GB/s that twelve loaders read out of the page cache (bench/README.md)
_SHARED_MEMORY = Path("/dev/shm")

# The kinds of memory: how they are made, and the flag with which they are registered.
Kind = tuple[Callable[[int], int], int]


def _kinds() -> dict[str, Kind]:
    return {
        "anonymous_huge": (anonymous, 0),
        "memfd_huge": (partial(shared, huge=True), 0),
        "memfd_small": (partial(shared, huge=False), 0),
        "file": (partial(page_cache, folder=Path(tempfile.gettempdir())), _READ_ONLY),
        "tmpfs_file": (partial(page_cache, folder=_SHARED_MEMORY), _READ_ONLY),
    }


def _registered(cuda: Gpu, kind: Kind, nbytes: int) -> int:
    make, flags = kind
    if flags == _READ_ONLY and not cuda.attribute(113):
        raise NotRun("the device registers no memory for reading only (attribute 113)")
    address = make(nbytes)
    try:
        cuda.register(address, nbytes, flags)
    except CudaError as error:
        raise NotRun(f"the memory cannot be registered: {error}") from None
    return address


@experiment("E4")
def sources(part: Part) -> None:
    """Decide which host memory the host cache may use: memfd, the page cache, the other NUMA node.

    Expected: 55 GB/s out of huge pages, 50 to 54 out of pages of 4 KiB, because the device then
    translates more addresses; a second stream adds 2 to 4 % to pieces of 2 MiB; the other NUMA node
    costs 10 to 25 %.
    """
    cuda = Gpu()
    region = part.scale(512, 16) * MIB
    sizes = (region, part.scale(2 * GIB, region))
    address, found = cuda.mapped(region), {}
    for name, kind in _kinds().items():
        with part.question(name):
            host = _registered(cuda, kind, region)
            for mib in part.scale((2, 16, 64), (2, 16)):
                for streams in (1, 2):
                    found[name, mib, streams] = rate = speed(
                        cuda, address, host, sizes, mib * MIB, streams
                    )
                    part.row(f"{name}_{mib}MiB_x{streams}_gb_per_s", rate, "GB/s")
            cuda.unregister(host)
    if not found:
        raise NotRun("no memory could be registered")
    fastest = max(found.values())
    for name in _kinds():
        rates = [rate for (kind, mib, _), rate in found.items() if kind == name and mib == 16]
        if rates:
            share = max(rates) / fastest
            verdict = "may be copied from as it is" if share >= _AS_FAST else "slows copies down"
            part.decide(f"{name} {verdict}: {share:.2f} of the fastest copies")
    first = next(iter(found))[0]
    gain = found[first, 2, 2] / found[first, 2, 1]
    part.decide(f"a second stream copies pieces of 2 MiB {gain:.2f} times as fast")
    with part.question("NUMA nodes"):
        _nodes(part, cuda, address, sizes)


def _nodes(part: Part, cuda: Gpu, address: int, sizes: tuple[int, int]) -> None:
    found = {}
    for node in nodes():
        host = _registered(cuda, (partial(anonymous, node=node), 0), sizes[0])
        found[node] = speed(cuda, address, host, sizes, 16 * MIB)
        part.row(f"node_{node}_gb_per_s", found[node], "GB/s")
        cuda.unregister(host)
    if len(found) < 2:
        raise NotRun("this machine has one node")
    share = min(found.values()) / max(found.values())
    part.decide(
        "the host cache may be on any NUMA node"
        if share >= _AS_FAST
        else f"the host cache must be on the device's NUMA node: the other has {share:.2f} of it"
    )


@experiment("E5")
def registration(part: Part) -> None:
    """Decide whether files may be pinned for each load, or only once and for good.

    Expected: 26 GB/s for touched huge pages, 20 for a memfd, 5 to 15 for the page cache, because
    each of its pages of 4 KiB is pinned by itself; four threads pin as fast as one, because they
    share a lock; unregistering takes as long.
    """
    cuda, rates = Gpu(), {}
    for mib in part.scale((64, 1024), (8,)):
        for name, kind in _kinds().items():
            with part.question(f"{name}, {mib} MiB"):
                rates[name] = _cost(part, cuda, f"{name}_{mib}MiB", kind, mib * MIB)
    with part.question("4 GiB in one call"):
        _cost(part, cuda, "anonymous_huge_large", (anonymous, 0), part.scale(4 * GIB, 16 * MIB))
    with part.question("four threads"):
        _threads(part, cuda, part.scale(256, 4) * MIB)
    files = [rate for name, rate in rates.items() if "file" in name]
    if files:
        part.decide(
            f"a file is pinned at {max(files):.1f} GB/s: "
            + (
                "pinning it for each load is as fast as reading it"
                if max(files) >= _LOADERS
                else "slower than loaders read it, so it must stay pinned"
            )
        )


def _cost(part: Part, cuda: Gpu, name: str, kind: Kind, nbytes: int) -> float:
    """Record the GB/s of registering and unregistering memory; return those of registering."""
    address = _registered(cuda, kind, nbytes)
    cuda.unregister(address)
    on, off = [], []
    for _ in range(_ROUNDS):
        on.append(seconds(lambda: cuda.register(address, nbytes, kind[1])))
        off.append(seconds(lambda: cuda.unregister(address)))
    rate = nbytes / statistics.median(on) / 1e9
    part.row(f"register_{name}_gb_per_s", rate, "GB/s")
    part.row(f"unregister_{name}_gb_per_s", nbytes / statistics.median(off) / 1e9, "GB/s")
    return rate


def _threads(part: Part, cuda: Gpu, nbytes: int) -> None:
    rates = {}
    for count in (1, 4):
        places = [anonymous(nbytes) for _ in range(count)]
        works = [partial(cuda.register, address, nbytes) for address in places]
        taken = seconds(partial(together, works, cuda))
        rates[count] = count * nbytes / taken / 1e9
        part.row(f"register_x{count}_gb_per_s", rates[count], "GB/s")
        for address in places:
            cuda.unregister(address)
    gain = rates[4] / rates[1]
    part.decide(
        f"four threads pin {gain:.1f} times as fast as one"
        + ("" if gain > 1.5 else ": one thread is enough")
    )
