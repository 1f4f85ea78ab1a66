"""Costs and bandwidth of the benches' simulated device, and pinned memory for its copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from warmserve_rt.testing.simcuda import SimulatedCuda

# Microseconds per call and per granule that it concerns. gpu.sh measured them on an H200 (driver
# 580.159) from whole calls on 1 to 256 granules of 2 to 32 MiB.
COSTS = {
    "cuMemCreate": (13.0, 0.05),
    "cuMemMap": (7.7, 0.0),
    "cuMemSetAccess": (24.0, 30.0),
    "cuMemUnmap": (12.0, 25.0),
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
