"""E1: one granule at several addresses."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lib.cuda import DigestCall, Gpu
from lib.harness import MIB, seconds
from parts.gpu.part import GRANULE, Part
from warmserve_rt.kernels import granule_digest
from warmserve_rt.testing.cuda_api import READ

from . import experiment

_PATTERNS = 8


def _mapped(cuda: Gpu, handle: int, access: int = 3) -> int:
    address = cuda.reserve(GRANULE)
    cuda.map(address, GRANULE, handle)
    cuda.set_access(address, GRANULE, access)
    return address


def _slab_bytes() -> int:
    """Return the memory of the kernel's own objects."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Slab:")), 0)


@experiment("E1")
def aliases(part: Part) -> None:
    """Decide whether copies may run through a writable alias of a granule while others read it.

    Expected: no mismatch, because CUDA documents that a kernel sees a copy through any alias if it
    begins after the copy is complete; 8192 aliases take 0.5 s to map and less than 50 MB.
    """
    cuda = Gpu()
    with part.question("coherence"):
        _coherence(part, cuda)
    with part.question("many aliases"):
        _many(part, cuda)


def _coherence(part: Part, cuda: Gpu) -> None:
    """Copy through the writable alias and digest through each read-only alias in turn.

    Copies and kernels are ordered by events alone, and the streams change from round to round.
    """
    handle = cuda.create(GRANULE)
    written, read = _mapped(cuda, handle), [_mapped(cuda, handle, READ) for _ in range(2)]
    function = cuda.function(cuda.module(cuda.kernel_image()), "ws_granule_digest")
    generator, rounds = np.random.default_rng(1), part.scale(2000, 40)
    patterns = [generator.bytes(GRANULE) for _ in range(_PATTERNS)]
    sources = [cuda.pinned(GRANULE, pattern) for pattern in patterns]
    wanted = [int(granule_digest(np.frombuffer(p, np.uint8))[0]) for p in patterns]
    out = cuda.pinned(-(-8 * rounds // 4096) * 4096)
    streams = [cuda.stream() for _ in range(3)]
    copied, digested = cuda.event(), cuda.event()

    def all_rounds() -> None:
        for turn in range(rounds):
            copies, kernels = streams[turn % 3], streams[(turn + 1 + turn // 3 % 2) % 3]
            cuda.wait(copies, digested)
            cuda.htod(written, sources[turn % _PATTERNS].address, GRANULE, copies)
            cuda.record(copied, copies)
            cuda.wait(kernels, copied)
            call = DigestCall(read[turn % 2], GRANULE, GRANULE, out.address + 8 * turn)
            cuda.launch(function, call, kernels, threads=1024)
            cuda.record(digested, kernels)
        cuda.context_synchronize()

    part.row("rounds_s", seconds(all_rounds), "s")
    found = np.frombuffer(out[: 8 * rounds], np.uint64)
    mismatches = sum(int(found[turn]) != wanted[turn % _PATTERNS] for turn in range(rounds))
    part.row("rounds", rounds, "rounds")
    part.row("mismatches", mismatches, "rounds")
    part.decide(
        f"{mismatches} digests were of other bytes: a copy must not run beside other aliases"
        if mismatches
        else "a kernel behind a copy's event sees the copy through any alias: a granule may be "
        "filled before it is unmapped elsewhere"
    )


def _many(part: Part, cuda: Gpu) -> None:
    count = part.scale(8192, 64)
    handle, address = cuda.create(GRANULE), cuda.reserve(count * GRANULE)
    free, slab = cuda.memory()[0], _slab_bytes()

    def map_all() -> None:
        for at in range(address, address + count * GRANULE, GRANULE):
            cuda.map(at, GRANULE, handle)
        cuda.set_access(address, count * GRANULE, READ)

    mapping = seconds(map_all)
    taken, kernel = free - cuda.memory()[0], _slab_bytes() - slab
    unmapping = seconds(lambda: cuda.unmap(address, count * GRANULE))
    part.row("aliases", count, "mappings")
    part.row("map_aliases_s", mapping, "s")
    part.row("unmap_aliases_s", unmapping, "s")
    part.row("device_memory_mb", taken / 1e6, "MB")
    part.row("kernel_bytes_per_alias", kernel / count, "bytes")
    part.decide(
        "keeping several models mapped on the same granules costs no device memory"
        if taken < 50 * MIB
        else f"each alias takes {taken / count:.0f} bytes of the device's memory"
    )
