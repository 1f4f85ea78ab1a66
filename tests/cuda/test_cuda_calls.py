"""Risk: ordinary calls stall the device's other streams, or a refused feature fails the arena."""

from __future__ import annotations

import ctypes
import gc
import time
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model
from cuda_runtime import SIZES, WEIGHT, make

from warmserve_rt import Runtime, testing
from warmserve_rt.kernels import granule_digest
from warmserve_rt.testing.cuda_api import Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda


def test_reading_layers_registers_no_memory_per_call(
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    with make(cuda, two_files) as runtime, runtime.lease("a"):

        def read() -> None:
            assert runtime.read_back("a", 0).tobytes() == content("a", 0, SIZES[0])
            wanted = granule_digest(content("a", 0, SIZES[0]), GRANULE)
            assert np.array_equal(runtime.digest("a", 0), wanted)

        read()
        names = ("cuMemHostRegister_v2", "cuMemHostUnregister", "cuStreamCreateWithPriority")
        before = {name: cuda.calls.get(name, 0) for name in names}
        for _ in range(5):
            read()
        assert {name: cuda.calls.get(name, 0) for name in names} == before
    gc.collect()
    cuda.check(leaks=True)


def test_reading_layers_waits_for_no_other_stream(
    cuda: SimulatedCuda, two_files: dict[str, Path]
) -> None:
    raw = Cuda(cuda.library).start()
    with make(cuda, two_files) as runtime:
        stream = raw.stream()
        with runtime.lease("a"):
            raw.sleep(stream, 900_000)
            begun = time.monotonic()
            runtime.read_back("a", 0)
            runtime.digest("a", 0)
            assert time.monotonic() - begun < 0.6
        raw.synchronize(stream)
        raw.stream_destroy(stream)
    raw.release_primary()


def test_a_layer_larger_than_the_buffer_is_read_in_pieces(
    cuda: SimulatedCuda, tmp_path: Path
) -> None:
    size = 2 * GRANULE + 12345
    with make(cuda) as runtime:
        runtime.register("m", write_model(tmp_path / "m", "m", [size]))
        with runtime.lease("m"):
            assert runtime.read_back("m", 0).tobytes() == content("m", 0, size)


@pytest.mark.parametrize("function", ["cuMemcpyDtoHAsync_v2", "cuStreamSynchronize"])
def test_a_read_that_fails_does_not_spoil_the_next(
    cuda: SimulatedCuda, two_files: dict[str, Path], function: str
) -> None:
    with make(cuda, two_files) as runtime:
        with runtime.lease("a"):
            for call in (1, 2, 3):
                cuda.faults.arm([(call, call)], only=function)
                with pytest.raises(Exception, match="returned CUDA_ERROR_UNKNOWN"):
                    runtime.read_back("a", 0)
                cuda.faults.disarm()
                assert runtime.read_back("a", 0).tobytes() == content("a", 0, SIZES[0])
        runtime.evict("a")
    gc.collect()
    cuda.check(leaks=True)


@pytest.mark.parametrize("error", [801, 304, 1])
@pytest.mark.parametrize("refused", [1, 2])
def test_a_feature_that_the_nth_granule_lacks_is_dropped_for_the_rest(
    cuda: SimulatedCuda, tmp_path: Path, refused: int, error: int
) -> None:
    """First the access of network cards is dropped, then the sharing with other processes."""
    posix_fd, rdma = 1, 15
    cuda.faults.arm([(3, 2 + refused)], only="cuMemCreate", status=error)
    with make(cuda, arena="12MiB") as runtime:
        assert cuda.faults.injected == refused
        sizes = [GRANULE] * 6
        runtime.register("m", write_model(tmp_path / "m", "m", sizes))
        with runtime.lease("m") as lease:
            raw = Cuda(cuda.library).start()
            addresses = [lease.tensors[f"model.layers.{i}.weight"].address for i in range(6)]
            kinds = sorted(
                (
                    raw.pointer_attribute(14, address, ctypes.c_uint),
                    raw.pointer_attribute(rdma, address, ctypes.c_int),
                )
                for address in addresses
            )
            raw.release_primary()
        lesser = (posix_fd if refused == 1 else 0, 0)
        assert kinds == [lesser] * 4 + [(posix_fd, 1)] * 2
    assert WEIGHT.startswith("model.layers.0")


def test_a_peer_has_a_context_before_access_is_set() -> None:
    """The peer's own driver may be opened later, or never."""
    with testing.simulated_cuda(devices=2, peers=True, memory="64MiB") as cuda:
        driver = testing.cuda_driver(cuda, 0, peers=[1])
        assert cuda.live["contexts"] == 2
        with Runtime(driver=driver, arena="16MiB", tensors="dlpack") as runtime:
            runtime.check_invariants()
        del runtime, driver
        gc.collect()
        assert cuda.live["contexts"] == 0
