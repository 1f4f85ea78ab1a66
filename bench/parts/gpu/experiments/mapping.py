"""E2: mapping by several threads."""

from __future__ import annotations

from functools import partial

from lib.cuda import Gpu
from lib.harness import MIB
from parts.gpu.part import Part

from . import experiment
from .tools import Cycle, Traffic, together

_COUNT = 16  # granules that a thread maps before it unmaps them
_SCALES = 1.5  # times the rate of one thread that count as a gain
_DEARER = 1.3  # times the cost alone that count as disturbed


@experiment("E2")
def mapping(part: Part) -> None:
    """Decide how many threads should make mapping calls, and which copies disturb them.

    Expected: 16 000 granules a second in all, for any number of threads and any size of a granule,
    because the kernel module takes one lock for each; 1.5 to 2 times the cost beside copies, with
    pieces of 2 MiB and of 64 MiB alike.
    """
    cuda = Gpu()
    time = part.scale(0.25, 0.02)
    sizes, threads = part.scale((2, 8, 16, 32), (2,)), part.scale((1, 2, 4, 8), (1, 2))

    def rate(mib: int, count: int) -> float:
        cycles = [Cycle(cuda, mib * MIB, _COUNT) for _ in range(count)]
        cycles[0].once()
        found = sum(together([partial(cycle.during, time) for cycle in cycles], cuda))
        for cycle in cycles:
            cycle.free()
        return found

    alone = {(mib, count): rate(mib, count) for mib in sizes for count in threads}
    for (mib, count), found in alone.items():
        part.row(f"granules_per_s_{mib}MiB_x{count}", found, "granules/s")
    gain = max(alone[mib, count] / alone[mib, 1] for mib in sizes for count in threads if count > 1)
    part.row("threads_gain", gain, "times")
    part.decide(
        f"several threads map {gain:.1f} times as fast as one: mapping may be spread over threads"
        if gain > _SCALES
        else "more threads map no faster: one thread should make all mapping calls"
    )
    dearer: dict[int, float] = {}
    for piece in (2, 64):
        traffic = Traffic(cuda, piece * MIB, part.scale(256, 64) * MIB)
        for mib in sizes[::2]:
            with traffic:
                beside = {count: rate(mib, count) for count in threads[::2]}
            for count, found in beside.items():
                times = alone[mib, count] / found
                part.row(f"cost_beside_{piece}MiB_pieces_{mib}MiB_x{count}", times, "times")
                dearer[piece] = max(dearer.get(piece, 0), times)
            part.row(f"copies_{piece}MiB_beside_{mib}MiB_gb_per_s", traffic.gb_per_s, "GB/s")
    part.decide(
        f"mapping costs up to {max(dearer.values()):.1f} times as much beside copies, "
        + ("most beside" if dearer[64] > _DEARER * dearer[2] else "and no more beside")
        + " pieces of 64 MiB"
    )
