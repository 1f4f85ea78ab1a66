"""Calls during a stream capture: which are refused, and which invalidate the capture.

The runtime makes its calls from threads in relaxed mode. The same calls from a thread in the
default mode show whether relaxed mode is needed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

from lib.cuda import Gpu, code
from warmserve_rt.testing.cuda_api import GLOBAL, PAGE, READ, RELAXED, THREAD_LOCAL

from . import DOCUMENTED, GRANULE, GUESS, MEASURED, OBSERVED, assumed, expect
from .memory import content, store
from .work import _create, _map, _register, _release, _set_access, _unmap, _unregister

Prepare = Callable[[Gpu], Callable[[], object]]


def in_thread(cuda: Gpu, mode: int, call: Callable[[], object]) -> int:
    """Return the result of a call on another thread in capture mode `mode`."""
    results: list[int] = []
    context = cuda.current()

    def body() -> None:
        cuda.set_current(context)
        cuda.exchange_mode(mode)
        results.append(code(call))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    return results[0]


def foreign_capture(cuda: Gpu, prepare: Prepare, capture: int, mode: int) -> tuple[int, int]:
    """Return the results of a call on another thread while this one captures, and of ending the
    capture."""
    ready, stream, address = prepare(cuda), cuda.stream(), cuda.mapped(GRANULE)
    cuda.begin_capture(stream, capture)
    cuda.memset(address, 1, 8, stream)
    result = in_thread(cuda, mode, ready)
    return result, code(cuda.end_capture, stream)


def _event_query(cuda: Gpu) -> Callable[[], object]:
    stream, event = cuda.stream(), cuda.event()
    cuda.record(event, stream)
    cuda.synchronize(stream)
    return lambda: cuda.done(event)


def _copy(cuda: Gpu) -> Callable[[], object]:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE), cuda.mapped(GRANULE)
    return lambda: cuda.htod(address, host.address, 8, stream)


def _stream_synchronize(cuda: Gpu) -> Callable[[], object]:
    stream = cuda.stream()
    return lambda: cuda.synchronize(stream)


def _record(cuda: Gpu) -> Callable[[], object]:
    stream, event = cuda.stream(), cuda.event()
    return lambda: cuda.record(event, stream)


def _wait(cuda: Gpu) -> Callable[[], object]:
    stream, event = cuda.stream(), cuda.event()
    return lambda: cuda.wait(stream, event)


def _reserve(cuda: Gpu) -> Callable[[], object]:
    return lambda: cuda.address_free(cuda.reserve(GRANULE), GRANULE)


def _streams(cuda: Gpu) -> Callable[[], object]:
    return lambda: cuda.stream_destroy(cuda.stream())


def _events(cuda: Gpu) -> Callable[[], object]:
    return lambda: cuda.event_destroy(cuda.event())


def _load(cuda: Gpu) -> Callable[[], object]:
    image = cuda.kernel_image()
    return lambda: cuda.module(image)


def _memory(cuda: Gpu) -> Callable[[], object]:
    return lambda: cuda.memory()


def _allocate(cuda: Gpu) -> Callable[[], object]:
    return lambda: cuda.out("cuMemAlloc_v2", GRANULE)


# Each call, and whether the simulator treats it as unsafe. An unsafe call is refused with 900 and
# the capture ends with 901, unless the thread is in relaxed mode.
_CALLS: dict[str, tuple[Prepare, bool, str]] = {
    "cuMemCreate": (_create, False, GUESS),
    "cuMemRelease": (_release, False, GUESS),
    "cuMemAddressReserve and Free": (_reserve, False, GUESS),
    "cuMemMap": (_map, False, GUESS),
    "cuMemSetAccess": (_set_access, False, GUESS),
    "cuMemUnmap": (_unmap, False, GUESS),
    "cuMemHostRegister": (_register, True, GUESS),
    "cuMemHostUnregister": (_unregister, True, GUESS),
    "cuEventQuery": (_event_query, True, OBSERVED),
    "cuEventRecord": (_record, False, GUESS),
    "cuStreamWaitEvent": (_wait, False, GUESS),
    "cuStreamSynchronize": (_stream_synchronize, True, GUESS),
    "cuMemcpyHtoDAsync": (_copy, False, GUESS),
    "cuStreamCreate and Destroy": (_streams, False, GUESS),
    "cuEventCreate and Destroy": (_events, False, GUESS),
    "cuModuleLoadData": (_load, False, MEASURED),
    "cuMemGetInfo": (_memory, False, GUESS),
    "cuMemAlloc": (_allocate, True, DOCUMENTED),
}
_FINE, _KILLED = (0, 0), (900, 901)


def _row(name: str, prepare: Prepare, unsafe: bool, source: str) -> None:
    def relaxed(cuda: Gpu) -> None:
        expect(foreign_capture(cuda, prepare, GLOBAL, RELAXED), _FINE, "call, capture:")

    def plain(cuda: Gpu) -> None:
        wanted = _KILLED if unsafe else _FINE
        expect(foreign_capture(cuda, prepare, GLOBAL, GLOBAL), wanted, "call, capture:")

    fine, killed = "allowed, and the capture survives", "900, and the capture ends with 901"
    assumed(f"{name} in a foreign capture, relaxed", fine, DOCUMENTED)(relaxed)
    assumed(f"{name} in a foreign capture", killed if unsafe else fine, source)(plain)


for _name, (_prepare, _unsafe, _source) in _CALLS.items():
    _row(_name, _prepare, _unsafe, _source)


@assumed("a foreign capture that is thread-local", "forbids other threads no call", DOCUMENTED)
def _(cuda: Gpu) -> None:
    expect(foreign_capture(cuda, _allocate, THREAD_LOCAL, GLOBAL), _FINE, "call, capture:")


@assumed("a thread-local thread in a foreign capture", "is forbidden no call", DOCUMENTED)
def _(cuda: Gpu) -> None:
    expect(foreign_capture(cuda, _allocate, GLOBAL, THREAD_LOCAL), _FINE, "call, capture:")


@assumed("the capturing thread, relaxed for one call", "the capture survives", OBSERVED)
def _(cuda: Gpu) -> None:
    stream, address = cuda.stream(), cuda.mapped(GRANULE)
    cuda.begin_capture(stream, GLOBAL)
    cuda.memset(address, 1, 8, stream)
    cuda.exchange_mode(RELAXED)
    result = code(_allocate(cuda))
    cuda.exchange_mode(GLOBAL)
    expect((result, code(cuda.end_capture, stream)), _FINE, "call, capture:")


@assumed("a graph after a remap", "reads the granule that is mapped at launch", OBSERVED)
def _(cuda: Gpu) -> None:
    stream, host = cuda.stream(), cuda.pinned(PAGE)
    address = cuda.reserve(GRANULE)
    first, second = cuda.create(GRANULE), cuda.create(GRANULE)

    def put(handle: int, what: bytes, access: int) -> None:
        cuda.map(address, GRANULE, handle)
        cuda.set_access(address, GRANULE)
        store(cuda, address, what)
        cuda.set_access(address, GRANULE, access)

    put(first, b"first", READ)
    cuda.begin_capture(stream)
    cuda.dtoh(host.address, address, 6, stream)
    executable = cuda.instantiate(cuda.end_capture(stream))
    got = []
    for handle, what in ((first, b"first "), (second, b"second"), (first, b"third ")):
        cuda.unmap(address, GRANULE)
        put(handle, what, READ)
        cuda.graph_launch(executable, stream)
        cuda.synchronize(stream)
        got.append(host[:6])
    expect(got, [b"first ", b"second", b"third "], "content")


@assumed("a graph captured while nothing is mapped", "1 at the copy, the capture survives", GUESS)
def _(cuda: Gpu) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE), cuda.reserve(GRANULE)
    cuda.begin_capture(stream)
    result = code(cuda.dtoh, host.address, address, 8, stream)
    expect((result, code(cuda.end_capture, stream)), (1, 0), "copy, capture:")


@assumed("a pageable source in a capture", "its address is stored and read at each launch", GUESS)
def _(cuda: Gpu) -> None:
    stream, address = cuda.stream(), cuda.mapped(GRANULE)
    source = ctypes.create_string_buffer(b"early", 64)
    cuda.begin_capture(stream)
    cuda.htod(address, ctypes.addressof(source), 5, stream)
    executable = cuda.instantiate(cuda.end_capture(stream))
    source.raw = b"late!" + bytes(59)
    cuda.graph_launch(executable, stream)
    cuda.synchronize(stream)
    expect(content(cuda, address, 5), b"late!", "content")


@assumed("capture status", "0 before, 1 in, 2 in an invalid capture, 0 after its end", DOCUMENTED)
def _(cuda: Gpu) -> None:
    stream = cuda.stream()
    got = [cuda.capture_status(stream)]
    cuda.begin_capture(stream)
    got.append(cuda.capture_status(stream))
    code(cuda.synchronize, stream)  # invalidates the capture
    got.append(cuda.capture_status(stream))
    code(cuda.end_capture, stream)
    expect([*got, cuda.capture_status(stream)], [0, 1, 2, 0], "status")


@assumed("the context of a stream", "where it was made, whatever is current", DOCUMENTED)
def _(cuda: Gpu) -> None:
    own, stream = cuda.current(), cuda.stream()
    if cuda.device_count() < 2:
        expect(cuda.stream_context(stream) == own, True, "this context:")
        return
    cuda.set_current(cuda.retain_primary(1))
    got = cuda.stream_context(stream)
    cuda.release_primary(1)
    cuda.set_current(own)
    expect(got == own, True, "this context:")
