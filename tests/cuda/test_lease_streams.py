"""Risk: a lease ends while the device still computes on its layers, and the next eviction unmaps
them under that work: the CUDA context dies, and all engines of the process with it."""

from __future__ import annotations

import asyncio
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from framework_streams import CupyCuda, Gpu, TorchCuda, simulated_gpu

from warmserve_rt import Busy, DeviceLost, Runtime, StaleView
from warmserve_rt.core import lease_streams


@pytest.fixture
def gpu(two_files: dict[str, Path]) -> Iterator[Gpu]:
    with simulated_gpu(two_files) as made:
        yield made


@pytest.fixture
def torch_cuda(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> TorchCuda:
    made = TorchCuda(gpu.cuda.library)
    monkeypatch.setitem(sys.modules, "torch.cuda", made)
    monkeypatch.delitem(sys.modules, "cupy.cuda", raising=False)
    return made


@pytest.fixture
def cupy_cuda(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> CupyCuda:
    made = CupyCuda(gpu.cuda.library)
    monkeypatch.setitem(sys.modules, "cupy.cuda", made)
    monkeypatch.delitem(sys.modules, "torch.cuda", raising=False)
    return made


@pytest.fixture(params=["torch", "cupy"])
def framework(request: pytest.FixtureRequest) -> TorchCuda | CupyCuda:
    found: TorchCuda | CupyCuda = request.getfixturevalue(f"{request.param}_cuda")
    return found


def held(runtime: Runtime) -> AbstractContextManager[object]:
    return runtime.lease("a")


@contextmanager
def held_by_a_task(runtime: Runtime) -> Iterator[None]:
    """Hold an asynchronous lease, whose task runs on this thread."""
    lease = runtime.lease("a")
    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(lease.__aenter__())
        yield
        loop.run_until_complete(lease.__aexit__(None, None, None))
    finally:
        loop.close()


@contextmanager
def held_in_two_calls(runtime: Runtime) -> Iterator[None]:
    lease = runtime.lease("a")
    lease.acquire()
    yield
    lease.release()


@contextmanager
def held_by_two_threads(runtime: Runtime) -> Iterator[None]:
    """Share a lease: this thread's acquisition ends first."""
    lease = runtime.lease("a").acquire()
    lease.acquire()
    yield
    lease.release()
    thread = threading.Thread(target=lease.release)
    thread.start()
    thread.join()


Hold = Callable[[Runtime], AbstractContextManager[object]]
HOLDS = [held, held_by_a_task, held_in_two_calls, held_by_two_threads]


@pytest.mark.parametrize("hold", HOLDS)
def test_a_lease_records_the_framework_s_current_stream(
    gpu: Gpu, framework: TorchCuda | CupyCuda, hold: Hold
) -> None:
    gpu.runtime.prewarm("a").wait()
    framework.current[0] = gpu.raw.stream()
    with hold(gpu.runtime):
        gpu.read(framework.current[0])
    with pytest.raises(Busy, match="a stream still uses"):
        gpu.runtime.evict("a", wait="nothing")
    assert not gpu.faults()


def test_unrecorded_work_is_unmapped_in_flight(gpu: Gpu, torch_cuda: TorchCuda) -> None:
    """The detector reports the same work under a lease with `stream=None`."""
    torch_cuda.current[0] = gpu.raw.stream()
    with gpu.runtime.lease("a", stream=None):
        gpu.read(torch_cuda.current[0])
    assert gpu.faults() == {"use-while-unmapped"}


def test_the_streams_of_the_acquisition_and_of_the_release_are_recorded(
    gpu: Gpu, framework: TorchCuda | CupyCuda
) -> None:
    """vLLM installs a stream of its own on first use, under the lease."""
    first, second = gpu.raw.stream(), gpu.raw.stream()
    framework.current[0] = first
    with gpu.runtime.lease("a"):
        gpu.read(first, 0)
        framework.current[0] = second
        gpu.read(second, 1)
    assert not gpu.faults()


def test_both_frameworks_are_recorded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    torch_cuda, cupy_cuda = TorchCuda(gpu.cuda.library), CupyCuda(gpu.cuda.library)
    torch_cuda.current[0], cupy_cuda.current[0] = gpu.raw.stream(), gpu.raw.stream()
    monkeypatch.setitem(sys.modules, "torch.cuda", torch_cuda)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy_cuda)
    with gpu.runtime.lease("a"):
        gpu.read(torch_cuda.current[0])
        gpu.read(cupy_cuda.current[0], 1)
    assert not gpu.faults()


def test_a_framework_that_is_imported_under_the_lease(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.cuda", "cupy.cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with gpu.runtime.lease("a"):
        torch_cuda = TorchCuda(gpu.cuda.library)
        monkeypatch.setitem(sys.modules, "torch.cuda", torch_cuda)
        torch_cuda.current[0] = gpu.raw.stream()
        gpu.read(torch_cuda.current[0])
    assert not gpu.faults()


def test_a_framework_that_does_not_use_cuda_has_no_stream(
    gpu: Gpu, torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy_cuda = CupyCuda(gpu.cuda.library)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy_cuda)
    torch_cuda.initialized, cupy_cuda.broken = False, True
    torch_cuda.current[0] = cupy_cuda.current[0] = 12345  # no stream of this device
    with gpu.runtime.lease("a"):
        gpu.runtime.read_back("a", 0)
    del torch_cuda.__class__.is_initialized  # the import is still under way, in another thread
    try:
        with gpu.runtime.lease("a"):
            pass
    finally:
        torch_cuda.__class__.is_initialized = lambda self: self.initialized  # type: ignore[method-assign]
    assert not gpu.faults()


def test_the_streams_of_other_devices_are_not_recorded(gpu: Gpu, torch_cuda: TorchCuda) -> None:
    torch_cuda.device, torch_cuda.current[1] = 1, 12345  # another device is torch's current one
    torch_cuda.current[0] = gpu.raw.stream()
    with gpu.runtime.lease("a"):
        gpu.read(torch_cuda.current[0])
    assert not gpu.faults()


@pytest.mark.parametrize("how", ["of the lease", "of the acquisition"])
def test_a_given_stream_is_recorded_and_no_other(gpu: Gpu, torch_cuda: TorchCuda, how: str) -> None:
    given, torch_cuda.current[0] = gpu.raw.stream(), gpu.raw.stream()
    if how == "of the lease":
        lease = gpu.runtime.lease("a", stream=given).acquire()
    else:
        lease = gpu.runtime.lease("a", stream=None).acquire(given)
    gpu.raw.sleep(torch_cuda.current[0], 1000)
    gpu.read(given)
    lease.release()
    with pytest.raises(Busy, match="a stream still uses"):
        gpu.runtime.evict("a", wait="nothing")
    gpu.raw.synchronize(given)
    gpu.runtime.evict("a", wait="nothing")  # the other stream is not waited for
    assert not gpu.faults()


def test_an_acquisition_may_opt_out(gpu: Gpu, torch_cuda: TorchCuda) -> None:
    torch_cuda.current[0] = gpu.raw.stream()
    gpu.raw.sleep(torch_cuda.current[0], 1000)
    gpu.runtime.lease("a").acquire(None).release()
    gpu.runtime.evict("a", wait="nothing")
    assert not gpu.faults()


def test_an_object_that_is_no_stream_is_refused(gpu: Gpu) -> None:
    for wrong in ("s", 1.5, False, object()):
        with pytest.raises(TypeError, match="stream must be one of"):
            gpu.runtime.lease("a", stream=wrong)
        with pytest.raises(TypeError, match="stream must be one of"):
            gpu.runtime.lease("a").acquire(wrong)
    assert gpu.runtime.snapshot().leases == 0


# Streams that are being captured


@contextmanager
def capture(gpu: Gpu, stream: int) -> Iterator[None]:
    """Capture a stream; check that nothing has invalidated the capture."""
    gpu.raw.begin_capture(stream)
    yield
    gpu.raw.call("cuGraphDestroy", gpu.raw.end_capture(stream))


REFUSED = "being captured into a CUDA graph: acquire the lease before the capture begins"


def test_a_lease_cannot_begin_in_a_capture(gpu: Gpu, framework: TorchCuda | CupyCuda) -> None:
    stream = framework.current[0] = gpu.raw.stream()
    lease = gpu.runtime.lease("a")
    for begin in (lease.acquire, lambda: asyncio.run(lease.__aenter__())):
        with capture(gpu, stream), pytest.raises(ValueError, match=REFUSED):
            begin()
    assert gpu.runtime.snapshot().leases == 0
    with capture(gpu, stream), gpu.runtime.lease("a", stream=None):
        pass
    assert not gpu.faults()


def test_a_lease_that_cannot_end_in_a_capture_is_held_and_loses_no_record(
    gpu: Gpu, framework: TorchCuda | CupyCuda
) -> None:
    stream = framework.current[0] = gpu.raw.stream()
    lease = gpu.runtime.lease("a").acquire()
    gpu.read(stream)
    with capture(gpu, stream):
        gpu.read(stream, 1)
        with pytest.raises(ValueError, match=REFUSED):
            lease.release()
        assert lease.held
    lease.release()
    with pytest.raises(Busy, match="a stream still uses"):
        gpu.runtime.evict("a", wait="nothing")
    assert not gpu.faults()


@pytest.mark.parametrize("given", [False, True])
def test_the_stream_of_the_acquisition_is_captured_at_the_release(
    gpu: Gpu, framework: TorchCuda | CupyCuda, given: bool
) -> None:
    captured = framework.current[0] = gpu.raw.stream()
    lease = gpu.runtime.lease("a")
    lease.acquire(framework_stream(framework)) if given else lease.acquire()
    framework.current[0] = 0
    with capture(gpu, captured), pytest.raises(ValueError, match=REFUSED):
        lease.release()
    lease.release()
    assert not gpu.faults()


def framework_stream(framework: TorchCuda | CupyCuda) -> Any:
    if isinstance(framework, TorchCuda):
        return framework.current_stream(0)
    return framework.get_current_stream(0)


def test_a_graph_is_captured_and_replayed_under_leases(gpu: Gpu, torch_cuda: TorchCuda) -> None:
    """The way that the message describes."""
    stream = gpu.raw.stream()
    with gpu.runtime.lease("a"):
        torch_cuda.current[0] = stream  # torch.cuda.graph() does this
        gpu.raw.begin_capture(stream)
        gpu.read(stream)
        graph = gpu.raw.instantiate(gpu.raw.end_capture(stream))
        torch_cuda.current[0] = 0
    gpu.runtime.evict("a")
    with gpu.runtime.lease("a"):
        torch_cuda.current[0] = stream
        gpu.raw.launch_graph(graph, stream)
    assert not gpu.faults()


def test_a_capture_elsewhere_does_not_concern_a_lease(gpu: Gpu, torch_cuda: TorchCuda) -> None:
    with capture(gpu, gpu.raw.stream()):
        torch_cuda.current[0] = gpu.raw.stream()
        with gpu.runtime.lease("a"):
            gpu.read(torch_cuda.current[0])
    assert not gpu.faults()


# Streams and devices that end


def test_a_lease_is_released_after_the_device_is_lost(
    gpu: Gpu, framework: TorchCuda | CupyCuda
) -> None:
    framework.current[0] = gpu.raw.stream()
    lease = gpu.runtime.lease("a").acquire()
    gpu.cuda.break_context(700)
    lease.release()
    assert not lease.held
    assert gpu.runtime.snapshot().leases == 0


def test_a_lease_is_released_if_finding_its_streams_fails_on_a_lost_device(
    gpu: Gpu, torch_cuda: TorchCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(ordinal: int) -> dict[int, Any]:
        raise DeviceLost("the context died")

    lease = gpu.runtime.lease("a").acquire()
    monkeypatch.setattr(lease_streams, "current_streams", lost)
    lease.release()
    assert not lease.held


def test_a_lease_is_released_after_the_primary_context_was_reset(
    gpu: Gpu, framework: TorchCuda | CupyCuda
) -> None:
    framework.current[0] = gpu.raw.stream()
    lease = gpu.runtime.lease("a").acquire()
    gpu.cuda.destroy_primary_context()
    lease.release()
    assert not lease.held


def test_the_record_outlives_a_stream_that_is_destroyed_after_the_release(
    gpu: Gpu, framework: TorchCuda | CupyCuda
) -> None:
    """CUDA destroys a stream when its work is complete, and so does the record outlive it."""
    stream = framework.current[0] = gpu.raw.stream()
    with gpu.runtime.lease("a"):
        gpu.read(stream)
    gpu.raw.stream_destroy(stream)
    framework.current[0] = 0
    with pytest.raises(Busy, match="a stream still uses"):
        gpu.runtime.evict("a", wait="nothing")
    assert not gpu.faults()


def test_a_lease_keeps_the_object_of_its_stream_alive(gpu: Gpu, cupy_cuda: CupyCuda) -> None:
    """CuPy destroys a stream together with its object."""
    gone: list[int] = []

    class Stream:
        ptr = gpu.raw.stream()

        def __del__(self) -> None:
            gone.append(self.ptr)

    lease = gpu.runtime.lease("a").acquire(Stream())
    gc.collect()
    assert not gone
    lease.release()
    gc.collect()
    assert gone
    assert not gpu.faults()


def test_a_pass_is_recorded_after_another_thread_has_ended_its_lease(gpu: Gpu) -> None:
    stream = gpu.raw.stream()
    lease = gpu.runtime.lease("a", stream=None).acquire()
    held = gpu.runtime.model("a").begin_pass()
    assert held is not None
    gpu.read(stream)
    thread = threading.Thread(target=lease.release)
    thread.start()
    thread.join()
    with pytest.raises(StaleView, match="not held"):
        lease.record(stream)
    held.record(gpu.runtime.adopt_stream(stream))
    held.release()
    assert not gpu.faults()
