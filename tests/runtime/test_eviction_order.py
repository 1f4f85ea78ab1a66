"""Risk: a load whose evictions wait for the device delays all loads behind it."""

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
