"""What the simulated device of the benches takes for its work, and memory for its copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from warmserve_rt.testing.simcuda import SimulatedCuda

# Microseconds of a call, and of each granule that it concerns, as gpu.sh measured them on an H200
# (driver 580.159): whole calls on 1 to 256 granules of 2 to 32 MiB.
COSTS = {
    "cuMemCreate": (13.0, 0.05),
    "cuMemMap": (7.7, 0.0),
    "cuMemSetAccess": (24.0, 30.0),
    "cuMemUnmap": (12.0, 25.0),
}
BANDWIDTH = 25e9  # bytes per second, host to device


@contextmanager
def pinned(cuda: SimulatedCuda, nbytes: int) -> Iterator[memoryview]:
    """Host memory that copies of the device write while the caller goes on."""
    from cuda_calls import Cuda

    raw = Cuda(cuda.library).start()
    memory = raw.pinned(nbytes)
    try:
        yield memory.view
    finally:
        raw.unregister(memory.address)
        raw.release_primary()
