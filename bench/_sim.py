"""What the simulated device of the benches takes for its work, and memory for its copies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from warmserve_rt.simcuda import SimulatedCuda

# Microseconds of a call on one granule, as measured on an A100 by kvcached's bench_vmm. It says
# nothing of how a call on a range splits into a part for the call and one for each granule: half
# and half is taken.
PER_GRANULE = {"cuMemCreate": 193.0, "cuMemMap": 1.5, "cuMemSetAccess": 36.0, "cuMemUnmap": 26.0}
RANGE_CALLS = ("cuMemSetAccess", "cuMemUnmap")
COSTS = {
    name: (cost / 2, cost / 2) if name in RANGE_CALLS else (0.0, cost)
    for name, cost in PER_GRANULE.items()
}
BANDWIDTH = 25e9  # bytes per second, host to device


@contextmanager
def pinned(cuda: SimulatedCuda, nbytes: int) -> Iterator[memoryview]:
    """Host memory that copies of the device write while the caller goes on."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    from cuda_calls import Cuda

    raw = Cuda(cuda.library).start()
    memory = raw.pinned(nbytes)
    try:
        yield memory.view
    finally:
        raw.unregister(memory.address)
        raw.release_primary()
