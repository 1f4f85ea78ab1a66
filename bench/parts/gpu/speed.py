"""Speed of copies, loads, swaps and leases on a CUDA device."""

from __future__ import annotations

import statistics
from time import perf_counter

from lib.cuda import Gpu, Pinned
from lib.harness import MIB, seconds
from parts.gpu.part import GRANULE, NotRun, Part, arena_for
from warmserve_rt import Model, Runtime


def _gb_per_s(nbytes: int, taken: list[float]) -> float:
    return nbytes / statistics.median(taken) / 1e9


def _region(part: Part) -> tuple[int, int]:
    """Return the bytes at either end of copies, and the bytes to copy for one time."""
    region = part.size(256 * MIB, 8 * MIB)
    return region, region if part.simulated else 16 * region


def _copies(
    cuda: Gpu, address: int, host: int, chunk: int, sizes: tuple[int, int], back: bool = False
) -> float:
    """Return GB/s of copies of one size, one after the other in one stream."""
    stream = cuda.stream()
    region, total = sizes

    def once() -> None:
        for at in range(0, total, chunk):
            place = at % region
            if back:
                cuda.dtoh(host + place, address + place, chunk, stream)
            else:
                cuda.htod(address + place, host + place, chunk, stream)
        cuda.synchronize(stream)

    once()
    return _gb_per_s(total, [seconds(once) for _ in range(5)])


def _granules(cuda: Gpu, nbytes: int) -> int:
    """Return addresses with many granules mapped, as for a model."""
    address = cuda.reserve(nbytes)
    for at in range(address, address + nbytes, GRANULE):
        cuda.map(at, GRANULE, cuda.create(GRANULE))
    cuda.set_access(address, nbytes)
    return address


def bandwidth(part: Part) -> None:
    """Measure the device's limit: only copies from pinned memory."""
    cuda = Gpu()
    region, _ = sizes = _region(part)
    host = cuda.pinned(region, b"x" * region)
    one, many = cuda.mapped(region), _granules(cuda, region)
    speeds = {}
    for mib in part.size((2, 8, 32, 256), (2, 8)):
        speeds[mib] = _copies(cuda, many, host.address, mib * MIB, sizes)
        part.row(f"h2d_{mib}MiB_gb_per_s", speeds[mib], "GB/s")
    part.row("h2d_limit_gb_per_s", max(speeds.values()), "GB/s")
    large = _copies(cuda, one, host.address, region, sizes)
    part.row("h2d_one_granule_gb_per_s", large, "GB/s")
    part.row("d2h_gb_per_s", _copies(cuda, many, host.address, region, sizes, True), "GB/s")
    pageable = Pinned(region)
    pageable[:region] = b"x" * region
    part.row("h2d_pageable_gb_per_s", _copies(cuda, many, pageable.address, region, sizes), "GB/s")
    pin = seconds(lambda: cuda.register(pageable.address, region))
    part.row("register_touched_gb_per_s", region / pin / 1e9, "GB/s")
    alloc = seconds(lambda: cuda.host_alloc(region))
    part.row("host_alloc_gb_per_s", region / alloc / 1e9, "GB/s")


def _loads(runtime: Runtime, model: Model, rounds: int) -> float:
    taken = []
    for _ in range(rounds + 1):
        runtime.evict(model)
        taken.append(seconds(lambda: runtime.prewarm(model).wait()))
    return _gb_per_s(model.nbytes, taken[1:])


def load(part: Part) -> None:
    """Measure loads of a model in the page cache through staging.

    They are compared with the lower of two limits: pinned copies to the device, and reading the
    file into memory with as many threads.
    """
    from load import huge_pages, read  # needs torch and safetensors

    path, threads = part.path("large"), 2 if part.simulated else 4
    nbytes, rounds = path.stat().st_size, part.size(5, 1)
    with huge_pages(nbytes) as memory:
        read(path, memory, threads)
        reading = _gb_per_s(
            nbytes, [seconds(lambda: read(path, memory, threads)) for _ in range(rounds)]
        )
    part.row("read_limit_gb_per_s", reading, "GB/s")
    cuda = Gpu()
    region, _ = sizes = _region(part)
    host, address = cuda.pinned(region, b"x" * region), _granules(cuda, region)
    copying = _copies(cuda, address, host.address, min(32 * MIB, region), sizes)
    part.row("copy_limit_gb_per_s", copying, "GB/s")
    limit, ratios = min(reading, copying), {}
    for chunk in (2, 8, 32):
        with part.runtime(
            arena=arena_for(part, "large"),
            staging="256MiB",
            chunk=f"{chunk}MiB",
            loaders=threads,
        ) as runtime:
            (model,) = part.register(runtime, "large")
            speed = _loads(runtime, model, rounds)
        part.row(f"load_{chunk}MiB_gb_per_s", speed, "GB/s")
        ratios[chunk] = speed / limit
    part.row("load_vs_copy_limit", ratios[8] * limit / copying, "times")
    if part.simulated:  # its copies compete with the reads for the CPU
        part.row("load_vs_limit", ratios[8], "times")
    else:
        part.target("load_vs_limit", ratios[8], "times", ">=", 0.8)


_MAPPING = ("unmap", "map", "set_access")


def swap(part: Part) -> None:
    """Measure swaps of two models that take turns in an arena for one."""
    for mib in (2, 8) if part.simulated else (2, 8, 32):
        granule = mib * MIB
        arena = arena_for(part, "a", "b", granule=granule)
        with part.runtime(arena=arena, granule=granule) as runtime:
            a, b = part.register(runtime, "a", "b")
            runtime.prewarm(a).wait()
            _swaps(part, runtime, a, b, f"{mib}MiB_")


def _swaps(part: Part, runtime: Runtime, a: Model, b: Model, prefix: str) -> None:
    taken, mapping, calls, speeds, creates = [], [], [], [], 0
    for turn, (evict, incoming) in enumerate([(a, b), (b, a)] * part.size(6, 2)):
        before, begin = runtime.snapshot(), perf_counter()
        runtime.swap(evict=evict, load=incoming).wait()
        spent, after = perf_counter() - begin, runtime.snapshot()
        if turn < 2:  # the first swap in each direction is a warm-up
            continue
        changes = {
            name: (count - before.driver_calls[name][0], ns - before.driver_calls[name][1])
            for name, (count, ns) in after.driver_calls.items()
        }
        granules = after.models[incoming.name].granules
        taken.append(spent)
        speeds.append(incoming.nbytes / spent / 1e9)
        mapping.append(sum(changes[name][1] for name in _MAPPING) / 1e3 / granules)
        calls.append(sum(changes[name][0] for name in _MAPPING) / granules)
        creates += changes["granule_create"][0]
    size = int(prefix.partition("MiB")[0])
    part.row(f"swap_{prefix}ms", 1e3 * statistics.median(taken), "ms")
    part.row(f"swap_{prefix}gb_per_s", statistics.median(speeds), "GB/s")
    part.row(f"swap_{prefix}mapping_us_per_granule", statistics.median(mapping), "us")
    part.row(f"swap_{prefix}mapping_us_per_2MiB", statistics.median(mapping) * 2 / size, "us")
    part.row(f"swap_{prefix}calls_per_granule", statistics.median(calls), "calls")
    part.target(f"swap_{prefix}creates", creates, "calls", "=", 0)


def lease(part: Part) -> None:
    """Run the lease measurements of bench/swap.py: resident models, busy loaders."""
    try:
        from swap import measure_leases
    except ImportError as error:
        raise NotRun(f"bench/swap.py cannot be imported: {error}") from None
    folder = part.folder / "leases"  # its checkpoints may have the names of ours
    folder.mkdir()
    measure_leases(part, folder)
