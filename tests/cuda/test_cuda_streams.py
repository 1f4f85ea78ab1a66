"""Risk: a stream of other code kills the runtime's context, or makes its layers unevictable: a
stream that is being captured, was destroyed, or belongs to another device or context."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GRANULE, content
from conftest import bytes_of
from cuda_runtime import SIZES, WEIGHT, make

from warmserve_rt import Runtime, WarmServeError, testing
from warmserve_rt.testing.cuda_api import BLOCKING, GLOBAL, LEGACY, Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda

CAPTURED = "being captured into a CUDA graph: acquire the lease before the capture begins, record"


@pytest.fixture
def raw(cuda: SimulatedCuda) -> Iterator[Cuda]:
    made = Cuda(cuda.library).start()
    yield made
    made.release_primary()


def check_that_it_still_works(runtime: Runtime) -> None:
    """Evict what is leased and recorded, load it again, and read it."""
    for name in "aba":
        runtime.swap(evict="b" if name == "a" else "a", load=name).wait(20)
        with runtime.lease(name):
            assert bytes_of(runtime, name, WEIGHT) == content(name, 0, SIZES[0])
    runtime.check_invariants()


# Captures


def test_a_stream_in_a_capture_is_refused(
    cuda: SimulatedCuda, raw: Cuda, two_files: dict[str, Path]
) -> None:
    with make(cuda, two_files) as runtime:
        own, foreign = runtime.stream(), raw.stream()
        refused_while_captured(runtime, raw, own, own.handle)
        refused_while_captured(runtime, raw, foreign, foreign)
        raw.stream_destroy(foreign)
        check_that_it_still_works(runtime)
        del own


def refused_while_captured(runtime: Runtime, raw: Cuda, stream: Any, handle: int) -> None:
    model, lease = runtime.model("a"), runtime.lease("a").acquire()
    adopted = runtime.adopt_stream(stream)
    raw.begin_capture(handle, GLOBAL)
    uses: list[Callable[[], object]] = [
        lambda: runtime.lease("a").acquire(stream),
        lambda: lease.record(stream),
        lambda: lease.wait(0, stream),
        lambda: model.record(stream),
        lambda: model.wait(0, stream),
        lambda: model.native.record(adopted),  # the native core checks for itself
        lambda: model.native.wait(0, adopted),
    ]
    for use in uses:
        with pytest.raises(ValueError, match=CAPTURED):
            use()
    assert runtime.snapshot().models["a"].leases == 1  # no lease began
    raw.call("cuGraphDestroy", raw.end_capture(handle))  # the capture was not disturbed
    lease.record(stream)
    lease.release()


def test_the_default_stream_beside_a_capture_is_refused(
    cuda: SimulatedCuda, raw: Cuda, two_files: dict[str, Path]
) -> None:
    """Any use of the legacy stream would end the capture of a blocking stream."""
    with make(cuda, two_files) as runtime:
        stream = raw.stream(BLOCKING)
        with runtime.lease("a") as lease:
            raw.begin_capture(stream, GLOBAL)
            with pytest.raises(ValueError, match=CAPTURED):
                lease.record(LEGACY)
            raw.call("cuGraphDestroy", raw.end_capture(stream))
            lease.record(LEGACY)
        check_that_it_still_works(runtime)
        raw.stream_destroy(stream)


def test_a_lease_released_inside_a_capture_keeps_earlier_work_safe(
    cuda: SimulatedCuda, raw: Cuda, two_files: dict[str, Path]
) -> None:
    with make(cuda, two_files, loaders=1) as runtime:
        stream, out = raw.stream(), raw.pinned(GRANULE)
        lease = runtime.lease("a").acquire(stream)
        raw.sleep(stream, 200_000)
        raw.dtoh(out.address, lease.tensors[WEIGHT].address, GRANULE, stream)
        raw.begin_capture(stream, GLOBAL)
        with pytest.raises(ValueError, match=CAPTURED):
            lease.release()
        assert not lease.held
        with pytest.raises(TimeoutError):  # the capture goes on
            runtime.evict("a", timeout=0.05)
        raw.call("cuGraphDestroy", raw.end_capture(stream))
        runtime.evict("a")
        assert out[0:GRANULE] == content("a", 0, SIZES[0])[:GRANULE]
        check_that_it_still_works(runtime)
        raw.unregister(out.address)
        raw.stream_destroy(stream)


# Streams that are not of this device, or not alive


def foreign(cuda: SimulatedCuda, raw: Cuda) -> tuple[int, int]:
    """Return a new context on device 0 and a stream of it; leave the current context as it was."""
    before, context = raw.current(), ctypes.c_uint64()
    library = ctypes.CDLL(str(cuda.library))
    assert library.cuCtxCreate_v2(ctypes.byref(context), ctypes.c_uint(0), ctypes.c_int(0)) == 0
    stream = raw.stream()
    library.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_uint64()))
    raw.set_current(before)
    return context.value, stream


def refused(runtime: Runtime, stream: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        runtime.lease("a").acquire(stream)
    with runtime.lease("a") as lease:
        for use in (lease.record, lambda s: lease.wait(0, s)):
            with pytest.raises(ValueError, match=match):
                use(stream)


def test_a_destroyed_stream_is_refused(
    cuda: SimulatedCuda, raw: Cuda, two_files: dict[str, Path]
) -> None:
    with make(cuda, two_files) as runtime:
        stream = raw.stream()
        adopted = runtime.adopt_stream(stream)
        raw.stream_destroy(stream)
        for dead in (stream, adopted):
            refused(runtime, dead, r"cannot be used on cuda:0.*CUDA_ERROR_INVALID_HANDLE \(400\)")
        check_that_it_still_works(runtime)
        lease, stream = runtime.lease("a"), raw.stream()
        lease.acquire(stream)
        raw.stream_destroy(stream)
        with pytest.raises(ValueError, match="its owner may have destroyed it"):
            lease.release()
        check_that_it_still_works(runtime)


def test_work_of_a_stream_that_was_destroyed_is_waited_for(
    cuda: SimulatedCuda, raw: Cuda, two_files: dict[str, Path]
) -> None:
    with make(cuda, two_files) as runtime:
        stream, out = raw.stream(), raw.pinned(GRANULE)
        lease = runtime.lease("a").acquire(stream)
        raw.sleep(stream, 100_000)
        raw.dtoh(out.address, lease.tensors[WEIGHT].address, GRANULE, stream)
        raw.stream_destroy(stream)  # its work goes on
        with pytest.raises(ValueError, match="cannot be used"):
            lease.release()
        runtime.evict("a")
        assert out[0:GRANULE] == content("a", 0, SIZES[0])[:GRANULE]
        raw.unregister(out.address)


def test_streams_of_another_device_or_context_are_refused(two_files: dict[str, Path]) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        other = Cuda(cuda.library).start(device=1)
        elsewhere = other.stream()
        raw = Cuda(cuda.library).start()
        context, beside = foreign(cuda, raw)
        with make(cuda, two_files) as runtime:
            for stream in (elsewhere, beside):
                refused(runtime, stream, "belongs to another device, or to a context that is not")
            assert ctypes.CDLL(str(cuda.library)).cuCtxDestroy_v2(ctypes.c_uint64(context)) == 0
            refused(runtime, beside, "cannot be used on cuda:0")
            check_that_it_still_works(runtime)
        other.stream_destroy(elsewhere)
        other.release_primary(1)
        raw.release_primary()


@pytest.mark.parametrize("error", [4, 201, 709])
@pytest.mark.parametrize("function", ["cuStreamGetCtx", "cuStreamIsCapturing", "cuEventRecord"])
def test_the_error_of_another_s_stream_does_not_lose_the_device(
    cuda: SimulatedCuda, raw: Cuda, two_files: dict[str, Path], function: str, error: int
) -> None:
    """A stream of a context that died may give these errors. Ours still works."""
    with make(cuda, two_files) as runtime:
        stream = raw.stream()
        with runtime.lease("a") as lease:
            cuda.faults.arm([(1, 1)], only=function, status=error)
            with pytest.raises((ValueError, WarmServeError), match=rf"{function} returned"):
                lease.record(stream)
            assert cuda.faults.injected == 1
            cuda.faults.disarm()
        check_that_it_still_works(runtime)
        raw.stream_destroy(stream)
