"""Risk: the runtime and the rest of the process disturb each other: torch's streams, a capture or
context of other code, a graph that outlives a lease, a framework that cannot see the memory."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_safetensors
from conftest import bytes_of
from cuda_runtime import SIZES, WEIGHT, make

from warmserve_rt import (
    Runtime,
    StaleView,
    WarmServeError,
    testing,
)
from warmserve_rt.testing.cuda_api import GLOBAL, NON_BLOCKING, Cuda, code
from warmserve_rt.testing.simcuda import SimulatedCuda


def test_a_load_does_not_invalidate_a_capture_of_other_code(
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    raw = Cuda(cuda.library).start()
    with make(cuda, two_files) as runtime:
        stream = raw.stream()
        raw.begin_capture(stream, GLOBAL)
        runtime.prewarm("a").wait()
        runtime.swap(evict="a", load="b").wait()
        graph = raw.end_capture(stream)
        raw.call("cuGraphDestroy", graph)
        raw.stream_destroy(stream)
    raw.release_primary()


def test_a_load_restores_the_thread_s_context_and_capture_mode(
    two_files: dict[str, Path],
) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        raw = Cuda(cuda.library).start(device=1)
        mine = raw.current()
        raw.exchange_mode(1)
        with make(cuda, two_files, pump=True) as runtime:
            with runtime.lease("a"):
                assert raw.current() == mine
                assert bytes_of(runtime, "a", WEIGHT) == content("a", 0, SIZES[0])
            assert raw.current() == mine
            assert raw.exchange_mode(1) == 1
        raw.release_primary(1)


def test_unmapping_waits_for_streams_of_other_libraries(two_files: dict[str, Path]) -> None:
    """Use a stream as torch does: the lease ends before the work, but no memory is unmapped."""

    class TorchStream:
        cuda_stream = 0

    with testing.simulated_cuda(d2h=100e6) as cuda:
        raw = Cuda(cuda.library).start()
        TorchStream.cuda_stream = raw.stream(NON_BLOCKING)
        with make(cuda, two_files) as runtime:
            out = raw.pinned(GRANULE)
            for stream in (TorchStream(), TorchStream.cuda_stream):
                lease = runtime.lease("a").acquire(stream)
                address = lease.tensors[WEIGHT].address
                for _ in range(5):
                    raw.dtoh(out.address, address, GRANULE, TorchStream.cuda_stream)
                lease.release()
                runtime.swap(evict="a", load="b").wait()
                assert out[0:GRANULE] == content("a", 0, SIZES[0])[:GRANULE]
            adopted = runtime.adopt_stream(TorchStream())
            assert adopted.handle == TorchStream.cuda_stream
            assert runtime.adopt_stream(adopted) is adopted
            del adopted
            with pytest.raises(TypeError, match=r"stream must be one of .*, got 'default'"):
                runtime.lease("a").acquire("default")
            raw.synchronize(TorchStream.cuda_stream)
        raw.unregister(out.address)
        raw.stream_destroy(TorchStream.cuda_stream)
        raw.release_primary()


def test_streams_have_their_named_priority(cuda: SimulatedCuda) -> None:
    raw = Cuda(cuda.library).start()
    with make(cuda) as runtime:
        streams = [runtime.stream(name) for name in ("background", "normal", "urgent")]
        found = [raw.priority(stream.handle) for stream in streams]
        assert found == sorted(found, reverse=True)  # lower numbers are more urgent
        assert len(set(found)) == 3
        with pytest.raises(
            ValueError, match="priority must be 'background', 'normal' or 'urgent', got 'high'"
        ):
            runtime.stream("high")  # type: ignore[arg-type]
        del streams
    raw.release_primary()


def test_the_host_device_refuses_streams_of_other_libraries(two_files: dict[str, Path]) -> None:
    with Runtime(arena="8MiB", tensors="numpy") as runtime:
        runtime.register("a", two_files["a"])
        with pytest.raises(ValueError, match="host accepts only streams"):
            runtime.lease("a").acquire(7)
        with pytest.raises(ValueError, match="host accepts only streams"):
            runtime.adopt_stream(7)
    assert runtime.closed


def test_a_graph_is_replayed_only_under_a_lease(two_files: dict[str, Path]) -> None:
    """A graph keeps addresses, not granules: under a new lease it reads the data mapped by then."""
    with testing.simulated_cuda(check=False) as cuda:
        raw = Cuda(cuda.library).start()
        runtime = make(cuda, two_files, arena="6MiB")
        stream, out = raw.stream(), raw.pinned(GRANULE)
        with runtime.lease("a") as lease:
            epoch = runtime.model("a").backing_epoch
            raw.begin_capture(stream, GLOBAL)
            raw.dtoh(out.address, lease.tensors[WEIGHT].address, GRANULE, stream)
            graph = raw.instantiate(raw.end_capture(stream))

        def replay() -> int:
            out[0:GRANULE] = bytes(GRANULE)
            raw.launch_graph(graph, stream)
            return code(raw.synchronize, stream)

        wanted = content("a", 0, SIZES[0])[:GRANULE]
        runtime.swap(evict="a", load="b").wait()
        with runtime.lease("a"):
            assert runtime.model("a").backing_epoch != epoch
            assert replay() == 0
            assert out[0:GRANULE] == wanted
        assert not cuda.violations
        runtime.swap(evict="a", load="b").wait()
        with suppress(Exception):  # either the launch or the run is refused
            assert replay() == 719
        assert out[0:GRANULE] != wanted
        assert "use-while-unmapped" in {violation.kind for violation in cuda.violations}


# Views


def test_frameworks_that_cannot_see_the_device_are_refused(
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    with pytest.raises(ValueError, match="'numpy': it cannot see this device's memory"):
        Runtime(driver=testing.cuda_driver(cuda), arena="16MiB", tensors="numpy")
    with Runtime(driver=testing.cuda_driver(cuda), arena="16MiB", tensors="torch") as runtime:
        runtime.register("a", two_files["a"])
        with runtime.lease("a") as lease:
            import torch

            if torch.backends.cuda.is_built():
                pytest.skip("this torch is built with CUDA and cannot use the simulated device")
            with pytest.raises(WarmServeError, match="a build without CUDA"):
                _ = lease.tensors


def test_capsules_name_the_device(two_files: dict[str, Path]) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        driver = testing.cuda_driver(cuda, 1)
        with Runtime(driver=driver, arena="16MiB", tensors="dlpack") as runtime:
            runtime.register("a", two_files["a"])
            with runtime.lease("a") as lease:
                view = lease.tensors[WEIGHT]
                assert view.__dlpack_device__() == (2, 1)
                for stream in (None, 1, 2, -1, 0x7F0000000000):
                    assert "dltensor_versioned" in repr(
                        view.__dlpack__(stream=stream, max_version=(1, 0), dl_device=(2, 1))
                    )
                for misuse in (
                    {"stream": 0},
                    {"stream": "main"},
                    {"copy": True},
                    {"dl_device": (1, 0)},
                    {"dl_device": (2, 0)},
                ):
                    with pytest.raises(BufferError):
                        view.__dlpack__(**misuse)
                with pytest.raises((BufferError, RuntimeError)):
                    np.from_dlpack(view)


def test_cupy_arrays_are_views_of_the_arena(cuda: SimulatedCuda, tmp_path: Path) -> None:
    """Check shape, dtype and address only: CuPy copies with libcudart, which cannot run here."""
    import cupy

    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_safetensors(tmp_path / "f", {"h.0.w": ("F32", [2, 3], wanted.tobytes())})
    with Runtime(driver=testing.cuda_driver(cuda), arena="16MiB", tensors="cupy") as runtime:
        runtime.register("f", path)
        with runtime.lease("f") as lease:
            array = lease.tensors["h.0.w"]
            assert isinstance(array, cupy.ndarray)
            assert (array.shape, array.dtype) == ((2, 3), np.float32)
            found = cuda.peek(array.data.ptr, wanted.nbytes)
            assert found == wanted.tobytes()
        del array


def test_a_lease_gives_cupy_arrays_in_a_runtime_of_another_framework(
    cuda: SimulatedCuda, tmp_path: Path
) -> None:
    cupy = pytest.importorskip("cupy")
    data = np.arange(6, dtype=np.float32)
    path = write_safetensors(tmp_path / "f", {"h.0.w": ("F32", [2, 3], data.tobytes())})
    with Runtime(driver=testing.cuda_driver(cuda), arena="16MiB", tensors="dlpack") as runtime:
        runtime.register("f", path)
        lease = runtime.lease("f")
        with pytest.raises(StaleView, match="not held"):
            lease.cupy()
        with lease:
            arrays = lease.cupy()
            assert isinstance(arrays["h.0.w"], cupy.ndarray)
            assert arrays["h.0.w"].data.ptr == lease.tensors["h.0.w"].address
            assert lease.cupy(runtime.model("f"))["h.0.w"] is arrays["h.0.w"]
        with pytest.raises(StaleView, match="was released"):
            arrays["h.0.w"]


def test_cupy_is_refused_on_the_host_device(two_files: dict[str, Path]) -> None:
    with Runtime(arena="8MiB", tensors="dlpack") as runtime:
        runtime.register("a", two_files["a"])
        with runtime.lease("a") as lease:
            with pytest.raises(ValueError, match="'cupy': it cannot see this device's memory"):
                lease.cupy()
            assert not hasattr(lease.tensors[WEIGHT], "__cuda_array_interface__")


@pytest.mark.parametrize(
    ("dtype", "shape", "name"),
    [
        ("F32", [2, 3], "<f4"),
        ("F16", [5], "<f2"),
        ("I64", [2], "<i8"),
        ("U8", [7], "|u1"),
        ("I8", [7], "|i1"),
        ("BOOL", [3], "|b1"),
        ("C64", [1, 2], "<c8"),
        ("F32", [0, 4], "<f4"),
        ("F32", [], "<f4"),
        ("BF16", [4], None),
        ("F8_E4M3", [4], None),
        ("F4", [4], None),
    ],
)
def test_views_support_the_cuda_array_interface(
    cuda: SimulatedCuda, tmp_path: Path, dtype: str, shape: list[int], name: str | None
) -> None:
    bits = {"C64": 64, "BOOL": 8, "F4": 4, "BF16": 16, "F8_E4M3": 8}
    width = bits.get(dtype) or int(dtype[1:])
    nbytes = int(np.prod(shape)) * width // 8
    path = write_safetensors(tmp_path / "f", {"h.0.w": (dtype, shape, bytes(nbytes))})
    with Runtime(driver=testing.cuda_driver(cuda), arena="16MiB", tensors="dlpack") as runtime:
        for model, writable in (("f", False), ("g", True)):
            runtime.register(model, path, writable=writable)
            with runtime.lease(model) as lease:
                view = lease.tensors["h.0.w"]
                if name is None:
                    with pytest.raises(AttributeError, match="use DLPack"):
                        _ = view.__cuda_array_interface__
                    continue
                assert view.__cuda_array_interface__ == {
                    "shape": tuple(shape),
                    "typestr": name,
                    "data": (view.address if nbytes else 0, not writable),
                    "strides": None,
                    "stream": None,
                    "version": 3,
                }
