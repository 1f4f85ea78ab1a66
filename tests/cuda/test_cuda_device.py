"""Risk: the CUDA device is missing, old, full, failing or shared, and the error is unclear or late.

The tests run on the simulated driver. bench/gpu.sh measures the facts that only a GPU can show.
"""

from __future__ import annotations

import ctypes
import gc
import mmap
import platform
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model
from conftest import bytes_of
from cuda_runtime import SIZES, WEIGHT, make

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
from warmserve_rt.testing.cuda_api import READ, Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda

# No driver, an old one, no device


def test_without_a_driver_the_error_says_what_to_do() -> None:
    with pytest.raises(WarmServeError, match=r"no CUDA driver \(.*not-there.*install NVIDIA's"):
        _native.cuda_driver(library="libnot-there.so.1")


def test_a_library_that_is_not_a_driver_is_refused() -> None:
    with pytest.raises(WarmServeError, match=r"libm\.so\.6 is not a CUDA driver: it has no"):
        _native.cuda_driver(library="libm.so.6")


def test_a_driver_that_is_too_old_is_refused() -> None:
    with (
        testing.simulated_cuda(driver_version=11080) as cuda,
        pytest.raises(WarmServeError, match=r"version 11\.8: update NVIDIA's driver to 525"),
    ):
        testing.cuda_driver(cuda)


@pytest.mark.parametrize("visible", ["", "-1", "7", "junk", "7,0"])
def test_opening_fails_if_no_device_is_visible(visible: str) -> None:
    with (
        testing.simulated_cuda(devices=2, visible=visible) as cuda,
        pytest.raises(WarmServeError, match="no CUDA device is visible: check nvidia-smi and CUDA"),
    ):
        testing.cuda_driver(cuda)


def test_an_ordinal_without_a_device_is_refused() -> None:
    for visible, count in (("0,1", 2), ("1", 1), ("0,9,1", 1)):
        with testing.simulated_cuda(devices=2, visible=visible) as cuda:
            for ordinal in (-1, count, 99):
                with pytest.raises(ValueError, match=f"no device cuda:{ordinal}: {count} are vis"):
                    testing.cuda_driver(cuda, ordinal)
            for ordinal in range(count):
                assert testing.cuda_driver(cuda, ordinal).cuda_ordinal == ordinal


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:", "cuda:-1", "cuda 0"])
def test_invalid_device_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"'host', 'cuda' or 'cuda:N'|N must be an integer from 0"):
        Runtime(name)


def script(text: str, cuda: SimulatedCuda, *arguments: object, **environment: str) -> str:
    """Run ``text`` in an interpreter that finds the simulated driver by name; return its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(text), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cuda.library.parent,  # outside the source tree, which would shadow the package
        env={**cuda.environment, **environment},
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
    return done.stdout


def test_the_device_is_found_by_its_name(two_files: dict[str, Path]) -> None:
    with testing.simulated_cuda(devices=2) as cuda:
        printed = script(
            """
            import sys
            from warmserve_rt import Runtime
            granules = {"granule": "2MiB", "max_padding": 1}
            for name in ("cuda", "cuda:0", "cuda:1"):
                with Runtime(name, arena="8MiB", tensors="dlpack", **granules) as runtime:
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
            two_files["a"],
            CUDA_VISIBLE_DEVICES="0,1",
        )
    total = sum(content("a", 0, SIZES[0]))
    assert printed.splitlines() == [
        f"(2, 0) {total}",
        f"(2, 0) {total}",
        f"(2, 1) {total}",
        "no device cuda:2: 2 are visible, cuda:0 to cuda:1 (CUDA_VISIBLE_DEVICES is '0,1')",
    ]


@pytest.mark.parametrize("last", ["once", "from-then-on"])
def test_a_failure_of_any_call_while_opening_is_named(last: str) -> None:
    """Opening either succeeds or fails with an error that names the call."""
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
                with Runtime(driver=driver, arena="16MiB", tensors="dlpack") as runtime:
                    runtime.check_invariants()
                del driver, runtime
                gc.collect()
            else:
                assert injected
                assert re.search(
                    r"cu[A-Z]\w+ returned|are visible|has no virtual|is unavailable", said
                )
        if not injected:
            assert call > 10
            return
    raise AssertionError("the walk does not end")


# Memory


def test_memory_that_another_process_holds_cannot_be_reserved(cuda: SimulatedCuda) -> None:
    cuda.others_hold("60MiB")
    with pytest.raises(
        OutOfDeviceMemory, match="8 MiB does not fit on a device with 4 MiB free of 64 MiB"
    ):
        make(cuda)


def test_an_arena_whose_memory_runs_out_halfway_is_refused(cuda: SimulatedCuda) -> None:
    cuda.faults.arm([(3, None)], only="cuMemCreate", status="out_of_memory")
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
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    with pytest.raises(OutOfDeviceMemory, match="60 MiB beside a headroom of 8 MiB does not fit"):
        make(cuda, arena="60MiB", headroom="8MiB")
    with make(cuda, two_files, arena=None, headroom="8MiB") as runtime:
        snapshot = runtime.snapshot()
        assert (snapshot.arena_bytes, snapshot.headroom_bytes) == (56 << 20, 8 << 20)
        assert runtime.device_memory() == (8 << 20, 64 << 20)
        runtime.trim()
        cuda.others_hold("54MiB")  # 10 MiB are left, and 8 MiB of them are headroom
        with pytest.raises(OutOfDeviceMemory, match="a granule beside a headroom of 8 MiB"):
            runtime.prewarm("a").wait()
        cuda.others_hold(0)
        runtime.prewarm("a").wait()


def ranges_that_prefer(node: int) -> int:
    """Return the number of this process's address ranges that prefer memory of a NUMA node."""
    lines = Path("/proc/self/numa_maps").read_text().splitlines()
    return sum(f"prefer:{node}" in line.split()[1] for line in lines)


def nodes_can_be_chosen() -> bool:
    """Return whether the kernel has NUMA nodes and the container allows a choice of them."""
    mbind = {"x86_64": 237, "aarch64": 235}.get(platform.machine())
    if mbind is None or not Path("/proc/self/numa_maps").exists():
        return False
    preferred, nodes = 1, ctypes.c_ulong(1)
    with mmap.mmap(-1, mmap.PAGESIZE) as memory:
        view = ctypes.c_char.from_buffer(memory)
        where, bits = ctypes.c_void_p(ctypes.addressof(view)), ctypes.c_ulong(65)
        size = ctypes.c_ulong(mmap.PAGESIZE)
        status = ctypes.CDLL(None).syscall(
            mbind, where, size, preferred, ctypes.byref(nodes), bits, 0
        )
        del view
    return bool(status == 0)


@pytest.mark.skipif(not nodes_can_be_chosen(), reason="NUMA nodes cannot be chosen here")
@pytest.mark.parametrize(("node", "prefers"), [(0, True), (-1, False), (900, False)])
def test_pinned_memory_is_on_the_node_next_to_the_device(
    two_files: dict[str, Path], node: int, prefers: bool
) -> None:
    """Node 900 does not exist: pinning goes on without it."""
    with testing.simulated_cuda(memory="64MiB", numa_node=node) as cuda:
        before = ranges_that_prefer(0)
        with make(cuda, two_files, host_cache="8MiB") as runtime:
            runtime.prewarm("a").wait()
            assert (ranges_that_prefer(0) > before) == prefers
            assert bytes(runtime.read_back("a", 1)) == content("a", 1, SIZES[1])
    assert ranges_that_prefer(0) == before


def test_granules_are_shareable_if_the_device_allows_it(cuda: SimulatedCuda) -> None:
    """POSIX file descriptors and RDMA must be enabled when a granule is created, not later."""
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
    """Yield a device whose only memory is the CPU's."""
    with testing.simulated_cuda(memory="64MiB", integrated=True) as simulated:
        yield simulated


def test_an_integrated_device_needs_no_staging(
    integrated: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    with make(integrated, two_files) as runtime:
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
def test_a_failing_call_loses_nothing_on_an_integrated_device(
    integrated: SimulatedCuda, two_files: dict[str, Path], last: str
) -> None:
    for call in range(1, 500):
        runtime = make(integrated, two_files, pump=True)
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


# Lost devices, forks and exits


@pytest.mark.parametrize("how", ["an illegal access elsewhere", "a context destroyed by others"])
def test_a_lost_device_says_so_at_every_later_call(two_files: dict[str, Path], how: str) -> None:
    with testing.simulated_cuda(check=False) as cuda:
        runtime = make(cuda, two_files, arena="16MiB")
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
            lambda: runtime.adopt_stream(1),
            lambda: runtime.set_keep_value("a", 1.0),
        ):
            with pytest.raises(DeviceLost, match=said):
                later()
        assert runtime.snapshot().models["a"].leases == 1  # snapshots and releases still work
        runtime.check_invariants()
        lease.release()
        runtime.close()
        runtime.close()


def test_a_device_lost_during_a_load_is_reported(two_files: dict[str, Path]) -> None:
    for call in range(1, 30):
        with testing.simulated_cuda(check=False) as cuda:
            runtime = make(cuda, two_files)
            cuda.faults.arm([(call, call)], only=None, status="device_lost")

            def load(runtime: Runtime = runtime) -> None:
                runtime.prewarm("a").wait()
                for _ in range(9):  # a loader may make its last calls after the ticket is done
                    runtime.prewarm("b").wait()
                    runtime.evict("b")

            try:
                load()
                # The fault hit a restoration of the thread's context or capture mode, at the end
                # of a call. That call succeeds; a later call may report the failure.
                assert cuda.faults.last in ("cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode")
            except DeviceLost:
                pass
            runtime.check_invariants()
            runtime.close()


def test_a_forked_child_is_refused_and_its_parent_unharmed(
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    printed = script(
        """
        import os, sys
        from warmserve_rt import Runtime, WarmServeError
        runtime = Runtime("cuda:0", arena="16MiB", tensors="dlpack")
        runtime.register("a", sys.argv[1])
        lease = runtime.lease("a").acquire()
        before = runtime.read_back("a", 0).tobytes()
        child = os.fork()
        if child == 0:
            said = []
            for use in (lambda: runtime.prewarm("a"), lambda: Runtime("cuda:0", arena="16MiB")):
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
        two_files["a"],
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
def test_the_interpreter_exits_with_work_in_flight(two_files: dict[str, Path], how: str) -> None:
    with testing.simulated_cuda(h2d=20e6) as cuda:  # 4 MiB take 0.2 s
        printed = script(
            f"""
            import sys
            from warmserve_rt import Runtime
            runtime = Runtime("cuda:0", arena="16MiB", tensors="dlpack")
            runtime.register("a", sys.argv[1])
            {how}
            print("bye")
            """,
            cuda,
            two_files["a"],
        )
    assert printed == "bye\n"


@pytest.mark.parametrize("device", ["host", "cuda:0"])
def test_the_loader_threads_end_at_exit_whatever_is_leased(
    two_files: dict[str, Path], device: str
) -> None:
    """A loader that runs on would call the driver while the process takes it down."""
    with testing.simulated_cuda() as cuda:
        printed = script(
            f"""
            import atexit, os, sys
            def threads():
                return len(os.listdir("/proc/self/task"))
            atexit.register(lambda: print(threads() - before))  # runs after the package's own
            from warmserve_rt import Runtime
            runtime = Runtime("{device}", arena="16MiB", tensors="dlpack", loaders=9)
            before = threads() - 9
            runtime.register("a", sys.argv[1])
            lease = runtime.lease("a").acquire()
            """,
            cuda,
            two_files["a"],
        )
    assert int(printed) < 5  # the driver's streams may have begun threads


# Checking content without copying it back


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


def test_everything_but_digests_works_without_kernels(
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    driver = _native.cuda_driver(library=str(cuda.library))
    with Runtime(driver=driver, arena="16MiB", tensors="dlpack") as runtime:
        runtime.register("a", two_files["a"])
        with runtime.lease("a"):
            assert bytes_of(runtime, "a", WEIGHT) == content("a", 0, SIZES[0])
            with pytest.raises(WarmServeError, match="has no kernels: they were not built"):
                runtime.digest("a", 0)
