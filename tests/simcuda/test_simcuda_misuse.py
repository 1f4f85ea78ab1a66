"""Risk: the simulated driver allows what CUDA forbids, so that code passes here and fails on a GPU;
or it returns another error, so that error handling is tested against an error that never occurs.

The table of misuses is the one that bench/gpu.sh holds against a device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from parts.gpu.assumptions.misuses import HOST, MEMORY, SHARING, WORK, G, Row
from parts.gpu.assumptions.stream_misuses import STREAMS
from warmserve_rt.testing import simulated_cuda
from warmserve_rt.testing.cuda_api import Cuda, CudaError, code
from warmserve_rt.testing.simcuda import SimulatedCuda, Violation


@pytest.fixture
def simulated() -> Iterator[SimulatedCuda]:
    with simulated_cuda(devices=2, memory="64MiB", clock="virtual", check=False) as made:
        yield made


@pytest.fixture
def cuda(simulated: SimulatedCuda) -> Cuda:
    return Cuda(simulated.library).start()


def check(row: Row, cuda: Cuda) -> None:
    failed = ("", 0)
    try:
        row.calls(cuda)
    except CudaError as error:
        failed = (error.function, error.code)
    assert failed == (row.function, row.error), f"source of the expected answer: {row.source}"


def parametrized(rows: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", rows, ids=[row.name.replace(" ", "-") for row in rows])


@parametrized(MEMORY)
def test_misuse_of_device_memory_is_refused(row: Row, cuda: Cuda) -> None:
    check(row, cuda)


@parametrized(SHARING)
def test_misuse_of_shared_memory_is_refused(row: Row, cuda: Cuda) -> None:
    check(row, cuda)


@parametrized(HOST)
def test_misuse_of_host_memory_is_refused(row: Row, cuda: Cuda) -> None:
    check(row, cuda)


@parametrized(WORK)
def test_misuse_of_work_and_contexts_is_refused(row: Row, cuda: Cuda) -> None:
    check(row, cuda)


@parametrized(STREAMS)
def test_misuse_of_questions_about_streams_is_refused(row: Row, cuda: Cuda) -> None:
    check(row, cuda)


def test_an_event_that_was_never_recorded_is_complete(cuda: Cuda) -> None:
    assert cuda.done(cuda.event())
    cuda.event_synchronize(cuda.event())


@pytest.mark.parametrize("call", ["cuDeviceGetCount", "cuMemGetInfo_v2", "cuMemAddressReserve"])
def test_calls_before_init_are_refused(call: str) -> None:
    with simulated_cuda() as simulated:
        c = Cuda(simulated.library)
        calls = {
            "cuDeviceGetCount": c.device_count,
            "cuMemGetInfo_v2": c.memory,
            "cuMemAddressReserve": lambda: c.reserve(G),
        }
        assert code(calls[call]) == 3


def test_init_fails_without_a_device() -> None:
    with simulated_cuda(visible="") as simulated:
        assert code(Cuda(simulated.library).init) == 100


def test_a_forked_child_is_refused(cuda: Cuda) -> None:
    child = os.fork()
    if child == 0:
        os._exit(code(cuda.memory))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
    cuda.memory()


def test_violations_name_their_call(cuda: Cuda, simulated: SimulatedCuda) -> None:
    address, streams = cuda.mapped(G), [cuda.stream(), cuda.stream()]
    for stream in streams:
        cuda.memset(address, 1, 1, stream)
    (found,) = simulated.violations
    assert (found.kind, found.call) == ("race", sum(simulated.calls.values()))
    assert isinstance(found, Violation)
    with pytest.raises(AssertionError, match=r"1 violations of CUDA's rules:\n  race at call \d+"):
        simulated.check(leaks=False)
