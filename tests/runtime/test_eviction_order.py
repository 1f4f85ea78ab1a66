"""Risk: a load that evicts delays others: those behind it for the device, or those before it."""

from __future__ import annotations

from pathlib import Path

from checkpoints import GRANULE, write_model
from cuda_runtime import make

from warmserve_rt import FOREGROUND, testing
from warmserve_rt.testing.cuda_api import Cuda


def test_a_load_that_waits_for_the_device_lets_those_behind_it_evict(tmp_path: Path) -> None:
    files = {name: write_model(tmp_path / name, name, [2 * GRANULE]) for name in "abcd"}
    with (
        testing.simulated_cuda(memory="64MiB", d2h=2 * GRANULE) as cuda,  # bytes per second
        make(cuda, files, loaders=2) as runtime,
    ):
        raw = Cuda(cuda.library).start()
        memory = raw.pinned(2 * GRANULE)
        stream = runtime.stream()
        runtime.set_keep_value("b", 1.0)  # so that a is evicted first
        with runtime.lease("a", stream=stream):
            stream.copy_from(memory.view, runtime.model("a").layer_bytes(0, 0, 2 * GRANULE))
        runtime.prewarm("b").wait()
        first = runtime.prewarm("c", priority=FOREGROUND)
        second = runtime.prewarm("d", priority=FOREGROUND)
        second.wait(30)
        assert not first.done  # the copy takes a second
        first.wait(30)
        stream.synchronize()
        raw.unregister(memory.address)
        raw.release_primary()


def test_a_load_evicts_before_those_behind_it(tmp_path: Path) -> None:
    """Evictions take turns in the driver: those of later layers must not delay the first layer."""
    unmap_s, layers = 0.01, 8  # for each granule, of which a layer has two
    files = {name: write_model(tmp_path / name, name, [2 * GRANULE] * layers) for name in "ab"}
    with (
        testing.simulated_cuda(
            memory="64MiB",
            clock="concurrent",
            mapping_lock=True,
            costs={"cuMemUnmap": (0.0, 1e6 * unmap_s)},
        ) as cuda,
        make(cuda, files, arena=2 * layers * GRANULE, staging="64MiB", loaders=8) as runtime,
    ):
        runtime.prewarm("a").wait()
        begin = cuda.now
        ticket = runtime.swap(evict="a", load="b")
        ticket.wait(layer=0)
        assert cuda.now - begin < 4 * unmap_s
        ticket.wait(30)
