"""Costs and bandwidth of the benches' simulated device, and pinned memory for its copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from warmserve_rt.testing.profiles import PROFILES
from warmserve_rt.testing.simcuda import SimulatedCuda

# Microseconds per call and per granule that it concerns: those of an H200.
COSTS = {
    name: PROFILES["h200"].costs[name]
    for name in ("cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemUnmap")
}
BANDWIDTH = 25e9  # bytes per second, host to device


@contextmanager
def pinned(cuda: SimulatedCuda, nbytes: int) -> Iterator[memoryview]:
    """Yield pinned host memory, the target of asynchronous copies from the device."""
    from warmserve_rt.testing.cuda_api import Cuda

    raw = Cuda(cuda.library).start()
    memory = raw.pinned(nbytes)
    try:
        yield memory.view
    finally:
        raw.unregister(memory.address)
        raw.release_primary()
