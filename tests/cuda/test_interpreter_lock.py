"""Risk: a thread holds the interpreter's lock over a driver call that waits, and stops all others,
for ever if the driver waits for a function that needs the lock."""

from __future__ import annotations

import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from cuda_runtime import make

from warmserve_rt import testing
from warmserve_rt.testing.cuda_api import Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda


@pytest.mark.parametrize(
    ("function", "call"),
    [
        ("cuMemcpyDtoHAsync_v2", lambda d, r, s, v: s.copy_from(bytearray(8), v)),
        ("cuMemGetInfo_v2", lambda d, r, s, v: r.device_memory()),
        ("cuMemGetInfo_v2", lambda d, r, s, v: d.memory()),
        ("cuStreamCreateWithPriority", lambda d, r, s, v: r.stream()),
        ("cuStreamGetCtx", lambda d, r, s, v: r.adopt_stream(s.handle)),
        ("cuStreamIsCapturing", lambda d, r, s, v: r.lease("a").acquire(s).release()),
        ("cuMemAddressReserve", lambda d, r, s, v: r.lease("b").acquire().release()),
        ("cuMemAddressReserve", lambda d, r, s, v: r.prewarm("b").cancel()),
        ("cuMemAddressReserve", lambda d, r, s, v: r.swap(evict="a", load="b").cancel()),
        ("cuMemAddressReserve", lambda d, r, s, v: r.model("b").layer_bytes(0)),
        ("cuMemAddressReserve", lambda d, r, s, v: r.tensors("b")),
    ],
)
def test_other_threads_run_while_the_driver_is_called(
    two_files: dict[str, Path], function: str, call: Any
) -> None:
    with testing.simulated_cuda(costs={function: (100_000.0, 0.0)}) as cuda:
        driver = testing.cuda_driver(cuda)
        runtime = make(cuda, two_files)
        runtime.prewarm("a").wait()
        stream, view = runtime.stream(), runtime.model("a").layer_bytes(0, 0, 8)
        turns: list[float] = []
        begun, done = threading.Event(), threading.Event()

        def turn() -> None:
            while not done.wait(0.004):
                turns.append(time.monotonic())
                begun.set()

        thread = threading.Thread(target=turn)
        thread.start()
        begun.wait()
        turns.clear()
        call(driver, runtime, stream, view)
        taken = len(turns)
        done.set()
        thread.join()
        stream.synchronize()
        del stream, view, driver
        runtime.close()
        assert taken > 3


def test_a_stream_is_dropped_without_the_interpreter_s_lock(cuda: SimulatedCuda) -> None:
    """Dropping a stream waits for its work, here a function that needs the interpreter's lock."""
    raw = Cuda(cuda.library).start()
    ran: list[int] = []
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: ran.append(1))
    with make(cuda) as runtime:
        stream = runtime.stream()
        address = ctypes.cast(callback, ctypes.c_void_p)
        raw.call("cuLaunchHostFunc", stream.handle, address, None)
        del stream
        assert ran == [1]
    raw.release_primary()
