"""Risk: while other code in the process captures a graph, our calls fail or invalidate the capture.

cuda.h documents the codes with each error. A forbidden call from another thread also invalidates
the capture; this was observed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from warmserve_rt.testing import simulated_cuda
from warmserve_rt.testing.cuda_api import (
    BLOCKING,
    GLOBAL,
    LEGACY,
    NON_BLOCKING,
    PAGE,
    RELAXED,
    THREAD_LOCAL,
    Cuda,
    code,
)

G = 2 << 20


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with simulated_cuda(clock="virtual", check=False) as simulated:
        yield Cuda(simulated.library).start()


def in_thread(cuda: Cuda, mode: int, call: Callable[[], object]) -> int:
    """Return the result of the call in another thread with that capture mode."""
    result = []

    def body() -> None:
        cuda.set_current(context)
        cuda.exchange_mode(mode)
        result.append(code(call))

    context = cuda.current()
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return result[0]


def allocate(cuda: Cuda) -> Callable[[], object]:
    return lambda: cuda.out("cuMemAlloc_v2", G)


def test_a_capture_records_and_runs_nothing(cuda: Cuda) -> None:
    stream, address, host = cuda.stream(), cuda.mapped(G), cuda.pinned(PAGE, b"before")
    cuda.htod(address, host.address, 6)
    cuda.begin_capture(stream)
    cuda.memset(address, 0, 6, stream)
    graph = cuda.end_capture(stream)
    cuda.dtoh(host.address + 100, address, 6)
    assert host[100:106] == b"before"
    cuda.call("cuGraphDestroy", graph)


@pytest.mark.parametrize(
    ("capture", "other", "dies"),
    [
        (GLOBAL, GLOBAL, True),
        (GLOBAL, THREAD_LOCAL, False),
        (GLOBAL, RELAXED, False),
        (THREAD_LOCAL, GLOBAL, False),
        (RELAXED, GLOBAL, False),
    ],
)
@pytest.mark.parametrize("call", ["allocate", "query"])
def test_a_call_of_another_thread_can_invalidate_a_capture(
    cuda: Cuda, capture: int, other: int, dies: bool, call: str
) -> None:
    stream, event = cuda.stream(), cuda.event()
    forbidden = {"allocate": allocate(cuda), "query": lambda: cuda.done(event)}[call]
    cuda.begin_capture(stream, capture)
    assert in_thread(cuda, other, forbidden) == (900 if dies else 0)
    assert code(cuda.end_capture, stream) == (901 if dies else 0)


@pytest.mark.parametrize("mode", [GLOBAL, THREAD_LOCAL, RELAXED])
def test_a_call_of_the_capturing_thread_can_invalidate_it(cuda: Cuda, mode: int) -> None:
    stream = cuda.stream()
    cuda.begin_capture(stream, mode)
    allowed = mode == RELAXED
    assert code(allocate(cuda)) == (0 if allowed else 900)
    assert code(cuda.end_capture, stream) == (0 if allowed else 901)


def test_a_relaxed_thread_may_allocate_while_it_captures(cuda: Cuda) -> None:
    stream = cuda.stream()
    cuda.begin_capture(stream, GLOBAL)
    assert cuda.exchange_mode(RELAXED) == GLOBAL
    assert code(allocate(cuda)) == 0
    assert cuda.exchange_mode(GLOBAL) == RELAXED
    assert code(cuda.end_capture, stream) == 0


def test_memory_management_is_allowed_during_a_capture(cuda: Cuda) -> None:
    """Known only indirectly: PyTorch guards its allocations, but not its expandable segments."""
    stream = cuda.stream()
    cuda.begin_capture(stream, GLOBAL)
    address = cuda.mapped(G)
    cuda.unmap(address, G)
    cuda.address_free(address, G)
    cuda.end_capture(stream)


def test_a_captured_stream_cannot_be_waited_for(cuda: Cuda) -> None:
    stream = cuda.stream()
    cuda.begin_capture(stream, RELAXED)
    assert code(cuda.synchronize, stream) == 900
    assert code(cuda.end_capture, stream) == 901


@pytest.mark.parametrize("mode", [GLOBAL, RELAXED])
def test_a_captured_event_cannot_be_queried(cuda: Cuda, mode: int) -> None:
    stream, event = cuda.stream(), cuda.event()
    cuda.begin_capture(stream, mode)
    cuda.record(event, stream)
    assert code(cuda.done, event) == 907
    assert code(cuda.event_synchronize, event) == 907


@pytest.mark.parametrize(("flags", "error"), [(BLOCKING, 906), (NON_BLOCKING, 0)])
def test_the_legacy_stream_would_join_a_capture(cuda: Cuda, flags: int, error: int) -> None:
    stream, address = cuda.stream(flags), cuda.mapped(G)
    cuda.begin_capture(stream, RELAXED)
    assert code(cuda.memset, address, 0, 1, LEGACY) == error
    assert code(cuda.end_capture, stream) == (901 if error else 0)


def test_the_legacy_stream_cannot_be_captured(cuda: Cuda) -> None:
    assert code(cuda.begin_capture, LEGACY) == 900


def test_a_fork_must_join_again(cuda: Cuda) -> None:
    origin, branch = cuda.stream(), cuda.stream()
    event, joined, address = cuda.event(), cuda.event(), cuda.mapped(G)

    def fork() -> None:
        cuda.begin_capture(origin)
        cuda.record(event, origin)
        cuda.wait(branch, event)
        cuda.memset(address, 0, 1, branch)

    fork()
    assert code(cuda.end_capture, origin) == 904
    fork()
    cuda.record(joined, branch)
    cuda.wait(origin, joined)
    cuda.call("cuGraphDestroy", cuda.end_capture(origin))


def test_a_capture_may_not_depend_on_work_outside_it(cuda: Cuda) -> None:
    stream, other, event = cuda.stream(), cuda.stream(), cuda.event()
    cuda.record(event, other)
    cuda.begin_capture(stream)
    assert code(cuda.wait, stream, event) == 905


def test_another_thread_cannot_end_a_capture(cuda: Cuda) -> None:
    stream = cuda.stream()
    cuda.begin_capture(stream)
    assert in_thread(cuda, RELAXED, lambda: cuda.end_capture(stream)) == 908


def test_a_capture_that_never_began_cannot_end(cuda: Cuda) -> None:
    assert code(cuda.end_capture, cuda.stream()) == 401
