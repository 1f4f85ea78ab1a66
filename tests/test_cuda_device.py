"""Risk: the CUDA device is missing, old, taken, dying or shared, and says so badly or too late.

On the simulated driver; what a GPU alone can tell is measured by bench/gpu.sh.
"""

from __future__ import annotations

import ctypes
import gc
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model, write_safetensors
from conftest import bytes_of
from cuda_calls import GLOBAL, NON_BLOCKING, READ, Cuda, code

from warmserve_rt import (
    DeviceLost,
    OutOfDeviceMemory,
    Runtime,
    StaleView,
    WarmServeError,
    _native,
    testing,
)
from warmserve_rt.kernels import granule_digest
from warmserve_rt.simcuda import SimulatedCuda

SIZES = [2 * GRANULE, 5]
WEIGHT = "model.layers.0.weight"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path / name, name, SIZES) for name in "ab"}


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with testing.simulated_cuda(memory="64MiB") as simulated:
        yield simulated


def make(cuda: SimulatedCuda, files: dict[str, Path] | None = None, **options: object) -> Runtime:
    """A runtime without wrappers: what the driver itself does is looked at."""
    defaults: dict[str, object] = {"arena": "8MiB", "staging": "4MiB", "chunk": "2MiB"}
    runtime = Runtime(
        driver=testing.cuda_driver(cuda),
        tensors="dlpack",
        **{**defaults, **options},  # type: ignore[arg-type]
    )
    for name, path in (files or {}).items():
        runtime.register(name, path)
    return runtime


# No driver, an old one, no device


def test_without_a_driver_the_error_says_what_to_do() -> None:
    with pytest.raises(WarmServeError, match=r"no CUDA driver \(.*not-there.*install NVIDIA's"):
        _native.cuda_driver(library="libnot-there.so.1")


def test_a_library_that_is_no_driver() -> None:
    with pytest.raises(WarmServeError, match=r"libm\.so\.6 is no CUDA driver: it lacks"):
        _native.cuda_driver(library="libm.so.6")


def test_a_driver_that_is_too_old() -> None:
    with (
        testing.simulated_cuda(driver_version=11080) as cuda,
        pytest.raises(WarmServeError, match=r"version 11\.8: update NVIDIA's driver to 525"),
    ):
        testing.cuda_driver(cuda)


@pytest.mark.parametrize("visible", ["", "-1", "7", "junk", "7,0"])
def test_no_device_is_visible(visible: str) -> None:
    with (
        testing.simulated_cuda(devices=2, visible=visible) as cuda,
        pytest.raises(WarmServeError, match="no CUDA device is visible: check nvidia-smi and CUDA"),
    ):
        testing.cuda_driver(cuda)


def test_an_index_that_is_not_there() -> None:
    for visible, count in (("0,1", 2), ("1", 1), ("0,9,1", 1)):
        with testing.simulated_cuda(devices=2, visible=visible) as cuda:
            for ordinal in (-1, count, 99):
                with pytest.raises(ValueError, match=f"no device cuda:{ordinal}: {count} are vis"):
                    testing.cuda_driver(cuda, ordinal)
            for ordinal in range(count):
                assert testing.cuda_driver(cuda, ordinal).cuda_ordinal == ordinal


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "CUDA:0", "cuda:0 "])
def test_names_that_are_no_device(name: str) -> None:
    with pytest.raises(ValueError, match="choose 'host', 'cuda' or 'cuda:N'"):
        Runtime(name)


def script(text: str, cuda: SimulatedCuda, *arguments: object, **environment: str) -> str:
    """What it prints, run by an interpreter that finds the simulated driver by its name."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cuda.library.parent,  # not the source tree, which shadows what is installed
        env={**cuda.environment, **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def test_the_device_is_found_by_its_name(files: dict[str, Path]) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        printed = script(
            """
            import sys
            from warmserve_rt import Runtime
            for name in ("cuda", "cuda:0", "cuda:1"):
                with Runtime(name, arena="8MiB", tensors="dlpack") as runtime:
                    runtime.register("a", sys.argv[1])
                    with runtime.lease("a") as lease:
                        view = lease.tensors["model.layers.0.weight"]
                        print(view.__dlpack_device__(), int(runtime.read_back("a", 0).sum()))
            try:
                Runtime("cuda:2")
            except ValueError as error:
                print(error)
            """,
            cuda,
            files["a"],
            CUDA_VISIBLE_DEVICES="0,1",
        )
    total = sum(content("a", 0, SIZES[0]))
    assert printed.splitlines() == [
        f"(2, 0) {total}",
        f"(2, 0) {total}",
        f"(2, 1) {total}",
        "no device cuda:2: 2 are visible, cuda:0 to cuda:1 (CUDA_VISIBLE_DEVICES is '0,1')",
    ]


# Memory


def test_another_process_holds_the_memory(cuda: SimulatedCuda) -> None:
    cuda.others_hold("60MiB")
    with pytest.raises(OutOfDeviceMemory, match="8 MiB on a device with 4 MiB free of 64 MiB"):
        make(cuda)


def test_memory_that_is_taken_half_way(cuda: SimulatedCuda) -> None:
    cuda.faults.arm([(4, None)], only="cuMemCreate", status="out_of_memory")
    with pytest.raises(
        OutOfDeviceMemory,
        match=r"an arena of 8 MiB: granule_create: out of memory: cuMemCreate returned "
        r"CUDA_ERROR_OUT_OF_MEMORY \(2\) after 4 MiB; the device has 64 MiB free of 64 MiB",
    ):
        make(cuda)
    cuda.faults.disarm()
    gc.collect()
    cuda.check(leaks=True)


def test_the_headroom_is_left_alone_and_reported(
    cuda: SimulatedCuda, files: dict[str, Path]
) -> None:
    with pytest.raises(OutOfDeviceMemory, match="60 MiB beside a headroom of 8 MiB on a device"):
        make(cuda, arena="60MiB", headroom="8MiB")
    with make(cuda, files, arena=None, headroom="8MiB") as runtime:
        snapshot = runtime.snapshot()
        assert (snapshot.arena_bytes, snapshot.headroom_bytes) == (56 << 20, 8 << 20)
        assert runtime.device_memory() == (8 << 20, 64 << 20)
        runtime.trim()
        cuda.others_hold("54MiB")  # 10 are left, of which 8 are not ours
        with pytest.raises(OutOfDeviceMemory, match="a granule beside a headroom of 8 MiB"):
            runtime.prewarm("a").wait()
        cuda.others_hold(0)
        runtime.prewarm("a").wait()


def test_granules_are_made_shareable_where_the_device_can(cuda: SimulatedCuda) -> None:
    """Neither can be added to a granule later."""
    posix_fd, rdma = 1, 15
    with make(cuda, {}) as runtime:
        path = cuda.library.parent / "m"
        runtime.register("m", write_model(path, "m", SIZES))
        with runtime.lease("m") as lease:
            address = lease.tensors[WEIGHT].address
            raw = Cuda(cuda.library).start()
            assert raw.pointer_attribute(14, address, ctypes.c_uint) == posix_fd
            assert raw.pointer_attribute(rdma, address, ctypes.c_int) == 1
            assert raw.get_access(address) == READ
            raw.release_primary()


@pytest.fixture
def integrated() -> Iterator[SimulatedCuda]:
    """A device that has no memory but the CPU's."""
    with testing.simulated_cuda(memory="64MiB", integrated=True) as simulated:
        yield simulated


def test_a_device_with_the_cpu_s_memory_needs_no_staging(
    integrated: SimulatedCuda, files: dict[str, Path]
) -> None:
    with make(integrated, files) as runtime:
        for name in "aba":
            with runtime.lease(name):
                assert bytes_of(runtime, name, WEIGHT) == content(name, 0, SIZES[0])
                wanted = granule_digest(content(name, 0, SIZES[0]), GRANULE)
                assert np.array_equal(runtime.digest(name, 0), wanted)
        assert runtime.snapshot().pinned_bytes == 0
        assert integrated.copied["h2d"] == 0
    gc.collect()
    integrated.check(leaks=True)


@pytest.mark.parametrize("last", ["once", "from-then-on"])
def test_on_a_device_with_the_cpu_s_memory_a_failing_call_loses_nothing(
    integrated: SimulatedCuda, files: dict[str, Path], last: str
) -> None:
    for call in range(1, 500):
        runtime = make(integrated, files, pump=True)
        integrated.faults.arm([(call, call if last == "once" else None)])
        with suppress(WarmServeError):
            runtime.prewarm("a").wait()
            runtime.trim()
            runtime.swap(evict="a", load="b").wait()
        injected = integrated.faults.injected
        integrated.faults.disarm()
        runtime.check_invariants()
        with runtime.lease("a"):
            assert bytes_of(runtime, "a", WEIGHT) == content("a", 0, SIZES[0])
        runtime.close()
        del runtime
        gc.collect()
        live = {kind: count for kind, count in integrated.live.items() if count}
        assert not live
        if not injected:
            return
    raise AssertionError("the walk does not end")


# What dies


@pytest.mark.parametrize("how", ["an illegal access elsewhere", "a context destroyed by others"])
def test_a_lost_device_says_so_at_every_later_call(files: dict[str, Path], how: str) -> None:
    with testing.simulated_cuda(check=False) as cuda:
        runtime = make(cuda, files, arena="16MiB")
        lease = runtime.lease("a").acquire()
        if how.startswith("an illegal"):
            cuda.break_context(700)
            said = r"died of CUDA_ERROR_ILLEGAL_ADDRESS \(700\); restart the process"
        else:
            cuda.destroy_primary_context()
            said = r"died of CUDA_ERROR_\w+ \(\d+\); restart the process"
        with pytest.raises(DeviceLost, match=said):
            runtime.prewarm("b").wait()
        for later in (
            lambda: runtime.prewarm("b"),
            lambda: runtime.swap(evict="a", load="b"),
            lambda: runtime.evict("b"),
            lambda: runtime.lease("b").acquire(),
            lambda: runtime.read_back("a", 0),
            lambda: runtime.digest("a", 0),
            lambda: runtime.trim(),
            lambda: runtime.stream(),
            lambda: runtime.stamp("a", 1.0),
        ):
            with pytest.raises(DeviceLost, match=said):
                later()
        assert runtime.snapshot().models["a"].leases == 1  # looking and letting go still work
        runtime.check_invariants()
        lease.release()
        runtime.close()
        runtime.close()


def test_a_device_lost_while_loading(files: dict[str, Path]) -> None:
    for call in range(1, 30):
        with testing.simulated_cuda(check=False) as cuda:
            runtime = make(cuda, files)
            cuda.faults.arm([(call, call)], only=None, status="device_lost")

            def load(runtime: Runtime = runtime) -> None:
                runtime.prewarm("a").wait()
                for _ in range(9):  # a loader's last calls may come after the ticket is done
                    runtime.prewarm("b").wait()
                    runtime.evict("b")

            try:
                load()
                # Leaving a call is no part of it: what fails there is told by the next, if at all.
                assert cuda.faults.last in ("cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode")
            except DeviceLost:
                pass
            runtime.check_invariants()
            runtime.close()


def test_fork_after_cuda_began(cuda: SimulatedCuda, files: dict[str, Path]) -> None:
    printed = script(
        """
        import os, sys
        from warmserve_rt import Runtime, WarmServeError
        runtime = Runtime("cuda:0", arena="8MiB", tensors="dlpack")
        runtime.register("a", sys.argv[1])
        lease = runtime.lease("a").acquire()
        before = runtime.read_back("a", 0).tobytes()
        child = os.fork()
        if child == 0:
            said = []
            for use in (lambda: runtime.prewarm("a"), lambda: Runtime("cuda:0", arena="8MiB")):
                try:
                    use()
                except WarmServeError as error:
                    said.append(str(error))
            lease.release()
            del runtime, lease
            print(*said, sep="\\n", flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        lease.release()
        runtime.evict("a")
        with runtime.lease("a"):
            assert runtime.read_back("a", 0).tobytes() == before
        runtime.close()
        print("fine")
        """,
        cuda,
        files["a"],
    )
    used, opened, parent = printed.splitlines()
    assert "belongs to the process that forked this one" in used
    assert "start workers by spawn" in opened
    assert parent == "fine"


@pytest.mark.parametrize(
    "how",
    [
        "runtime.prewarm('a')",
        "runtime.prewarm('a').wait()",
        "lease = runtime.lease('a').acquire()",
        "stream = runtime.stream(); lease = runtime.lease('a').acquire(stream); lease.release()",
        "import os; runtime.prewarm('a'); print('bye', flush=True); os._exit(0)",
    ],
)
def test_the_interpreter_exits_with_work_in_flight(files: dict[str, Path], how: str) -> None:
    with testing.simulated_cuda(h2d=20e6) as cuda:  # 4 MiB take 0.2 s
        printed = script(
            f"""
            import sys
            from warmserve_rt import Runtime
            runtime = Runtime("cuda:0", arena="8MiB", tensors="dlpack")
            runtime.register("a", sys.argv[1])
            {how}
            print("bye")
            """,
            cuda,
            files["a"],
        )
    assert printed == "bye\n"


# What the rest of the process does


def test_a_capture_elsewhere_is_not_broken_by_loading(
    cuda: SimulatedCuda, files: dict[str, Path]
) -> None:
    raw = Cuda(cuda.library).start()
    with make(cuda, files) as runtime:
        stream = raw.stream()
        raw.begin_capture(stream, GLOBAL)
        runtime.prewarm("a").wait()
        runtime.swap(evict="a", load="b").wait()
        graph = raw.end_capture(stream)
        raw.call("cuGraphDestroy", graph)
        raw.stream_destroy(stream)
    raw.release_primary()


def test_the_thread_s_context_and_capture_mode_are_left_as_they_were(
    files: dict[str, Path],
) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        raw = Cuda(cuda.library).start(device=1)
        mine = raw.current()
        raw.exchange_mode(1)
        with make(cuda, files, pump=True) as runtime:
            with runtime.lease("a"):
                assert raw.current() == mine
                assert bytes_of(runtime, "a", WEIGHT) == content("a", 0, SIZES[0])
            assert raw.current() == mine
            assert raw.exchange_mode(1) == 1
        raw.release_primary(1)


def test_streams_of_others_are_waited_for(files: dict[str, Path]) -> None:
    """As a torch stream is: the lease ends, the work does not, and nothing is unmapped under it."""

    class TorchStream:
        cuda_stream = 0

    with testing.simulated_cuda(d2h=100e6) as cuda:
        raw = Cuda(cuda.library).start()
        TorchStream.cuda_stream = raw.stream(NON_BLOCKING)
        with make(cuda, files) as runtime:
            out = raw.pinned(GRANULE)
            for stream in (TorchStream(), TorchStream.cuda_stream):
                lease = runtime.lease("a").acquire(stream)
                address = lease.tensors[WEIGHT].address
                for _ in range(5):
                    raw.dtoh(out.address, address, GRANULE, TorchStream.cuda_stream)
                lease.release()
                runtime.swap(evict="a", load="b").wait()
                assert out[0:GRANULE] == content("a", 0, SIZES[0])[:GRANULE]
            with pytest.raises(TypeError, match="str is no stream"):
                runtime.lease("a").acquire("default")
            raw.synchronize(TorchStream.cuda_stream)
        raw.unregister(out.address)
        raw.stream_destroy(TorchStream.cuda_stream)
        raw.release_primary()


def test_priorities_of_streams(cuda: SimulatedCuda) -> None:
    raw = Cuda(cuda.library).start()
    with make(cuda) as runtime:
        streams = [runtime.stream(name) for name in ("background", "normal", "urgent")]
        found = [raw.priority(stream.handle) for stream in streams]
        assert found == sorted(found, reverse=True)  # lower numbers are more urgent
        assert len(set(found)) == 3
        with pytest.raises(ValueError, match="no stream priority 'high'"):
            runtime.stream("high")  # type: ignore[arg-type]
        del streams
    raw.release_primary()


def test_streams_of_others_on_the_host(files: dict[str, Path]) -> None:
    with Runtime(arena="8MiB", tensors="numpy") as runtime:
        runtime.register("a", files["a"])
        with pytest.raises(ValueError, match="host has no streams but those"):
            runtime.lease("a").acquire(7)


def test_a_graph_is_replayed_only_under_a_lease(files: dict[str, Path]) -> None:
    """It keeps addresses, not granules: under a new lease it reads what is there by then."""
    with testing.simulated_cuda(check=False) as cuda:
        raw = Cuda(cuda.library).start()
        runtime = make(cuda, files, arena="6MiB")
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
        with suppress(Exception):  # refused at the launch, or when it runs
            assert replay() == 700
        assert out[0:GRANULE] != wanted
        assert "use-while-unmapped" in {violation.kind for violation in cuda.violations}


# Content without copying back


def test_digests_are_of_the_content_on_the_device(device: object, tmp_path: Path) -> None:
    runtime = device.runtime()  # type: ignore[attr-defined]
    sizes = [2 * GRANULE + 13, 8, GRANULE]
    runtime.register("m", write_model(tmp_path / "m", "m", sizes))
    with pytest.raises(StaleView, match="absent"):
        runtime.digest("m", 0)
    with runtime.lease("m"):
        for layer, nbytes in enumerate(sizes):
            wanted = granule_digest(content("m", layer, nbytes), GRANULE)
            assert np.array_equal(runtime.digest("m", layer), wanted)
    with pytest.raises(ValueError, match="no layer 3"):
        runtime.digest("m", 3)


def test_without_kernels_all_but_digests_works(cuda: SimulatedCuda, files: dict[str, Path]) -> None:
    driver = _native.cuda_driver(library=str(cuda.library))
    with Runtime(driver=driver, arena="8MiB", tensors="dlpack") as runtime:
        runtime.register("a", files["a"])
        with runtime.lease("a"):
            assert bytes_of(runtime, "a", WEIGHT) == content("a", 0, SIZES[0])
            with pytest.raises(WarmServeError, match="has no kernels: they were not built"):
                runtime.digest("a", 0)


# Views


def test_frameworks_that_cannot_see_the_device(cuda: SimulatedCuda, files: dict[str, Path]) -> None:
    with pytest.raises(ValueError, match="'numpy': it cannot see this device's memory"):
        Runtime(driver=testing.cuda_driver(cuda), arena="8MiB", tensors="numpy")
    with Runtime(driver=testing.cuda_driver(cuda), arena="8MiB", tensors="torch") as runtime:
        runtime.register("a", files["a"])
        with runtime.lease("a") as lease:
            import torch

            if torch.backends.cuda.is_built():
                pytest.skip("torch is a build with CUDA, and the simulated device is not for it")
            with pytest.raises(WarmServeError, match="a build without CUDA"):
                _ = lease.tensors


def test_capsules_name_the_device(files: dict[str, Path]) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        driver = testing.cuda_driver(cuda, 1)
        with Runtime(driver=driver, arena="8MiB", tensors="dlpack") as runtime:
            runtime.register("a", files["a"])
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


@pytest.mark.parametrize("last", ["once", "from-then-on"])
def test_opening_a_device_with_each_call_failing(last: str) -> None:
    """It opens or says why; what it says names the call."""
    for call in range(1, 100):
        with testing.simulated_cuda() as cuda:
            cuda.faults.arm([(call, call if last == "once" else None)])
            said, driver = "", None
            try:
                driver = testing.cuda_driver(cuda)
            except (WarmServeError, ValueError) as error:
                said = str(error)
            injected = cuda.faults.injected
            cuda.faults.disarm()
            if driver:
                with Runtime(driver=driver, arena="8MiB", tensors="dlpack") as runtime:
                    runtime.check_invariants()
                del driver, runtime
                gc.collect()
            else:
                assert injected
                assert re.search(
                    r"cu[A-Z]\w+ returned|are visible|has no virtual|cannot be had", said
                )
        if not injected:
            assert call > 10
            return
    raise AssertionError("the walk does not end")


def test_cupy_arrays_over_the_arena(cuda: SimulatedCuda, tmp_path: Path) -> None:
    """Shape, dtype and address; CuPy itself copies nothing, for libcudart cannot run here."""
    import cupy

    wanted = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = write_safetensors(tmp_path / "f", {"h.0.w": ("F32", [2, 3], wanted.tobytes())})
    with Runtime(driver=testing.cuda_driver(cuda), arena="8MiB", tensors="cupy") as runtime:
        runtime.register("f", path)
        with runtime.lease("f") as lease:
            array = lease.tensors["h.0.w"]
            assert isinstance(array, cupy.ndarray)
            assert (array.shape, array.dtype) == ((2, 3), np.float32)
            found = cuda.peek(array.data.ptr, wanted.nbytes)
            assert found == wanted.tobytes()
        del array
