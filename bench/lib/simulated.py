"""Costs and bandwidth of the benches' simulated device, and a computation that it can run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from warmserve_rt import Lease, Model, _native
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


@contextmanager
def computation(
    cuda: SimulatedCuda, model: Model, stream: _native.Stream, nbytes: int
) -> Iterator[Callable[[Lease], None]]:
    """Yield a function that computes the whole model under a streaming lease.

    A copy of the layer's last `nbytes` to the host stands for its computation. It takes the same
    time for each layer and is ordered on the stream behind the layer's arrival.
    """
    views = [model.layer_bytes(layer.index, layer.nbytes - nbytes) for layer in model.layers]
    with pinned(cuda, nbytes) as out:

        def compute(lease: Lease) -> None:
            for layer, view in enumerate(views):
                lease.wait(layer, stream)
                stream.copy_from(out, view)
            stream.synchronize()

        yield compute
