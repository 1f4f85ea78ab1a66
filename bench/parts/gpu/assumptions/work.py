"""Streams, copies and events: which operations wait for which, and when memory is read.

A gate blocks a stream with a host function that returns only when the gate is opened, so work
behind it is certainly pending.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from lib.cuda import Gate, Gpu, NotRun, code, microseconds
from warmserve_rt.testing.cuda_api import BLOCKING, LEGACY, PAGE, Pinned
from warmserve_rt.testing.cuda_types import Prop

from . import DOCUMENTED, GRANULE, GUESS, MEASURED, OBSERVED, Refuted, assumed, expect
from .memory import content, store

_LARGE = 64 << 20


def filled(cuda: Gpu, what: bytes) -> int:
    address = cuda.mapped(GRANULE)
    store(cuda, address, what)
    return address


def _source_read(cuda: Gpu, host: Pinned, late: bool, nbytes: int) -> str:
    stream, address = cuda.stream(), cuda.mapped(_LARGE)
    host[:5] = b"early"
    with Gate(cuda, stream) as gate:
        cuda.htod(address, host.address, nbytes, stream)
        waited = gate.expired
        host[:5] = b"late!"
    cuda.synchronize(stream)
    expect(content(cuda, address, 5), b"late!" if late else b"early", "content")
    return "the call waited for the stream" if waited else "the call did not wait"


for _nbytes in (5, 1 << 20, _LARGE):

    @assumed(f"pinned source of {_nbytes} bytes", "read when the copy runs", DOCUMENTED)
    def _(cuda: Gpu, nbytes: int = _nbytes) -> str:
        return _source_read(cuda, cuda.pinned(_LARGE), True, nbytes)

    @assumed(f"pageable source of {_nbytes} bytes", "read before the call returns", OBSERVED)
    def _(cuda: Gpu, nbytes: int = _nbytes) -> str:
        return _source_read(cuda, Pinned(_LARGE), False, nbytes)


@assumed("a copy to pinned memory", "arrives when it runs, not before", DOCUMENTED)
def _(cuda: Gpu) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE, b"-----"), filled(cuda, b"xxxxx")
    with Gate(cuda, stream):
        cuda.dtoh(host.address, address, 5, stream)
        before = host[:5]
    cuda.synchronize(stream)
    expect((before, host[:5]), (b"-----", b"xxxxx"), "before and after:")


@assumed("a copy to pageable memory", "the call waits for the stream", OBSERVED)
def _(cuda: Gpu) -> None:
    stream, host, address = cuda.stream(), Pinned(PAGE), filled(cuda, b"xxxxx")
    with Gate(cuda, stream) as gate:
        cuda.dtoh(host.address, address, 5, stream)
        expect(gate.expired, True, "waited:")


@assumed("an event that was never recorded", "is complete, and is not waited for", DOCUMENTED)
def _(cuda: Gpu) -> None:
    event, stream = cuda.event(), cuda.stream()
    expect(cuda.done(event), True, "complete:")
    cuda.wait(stream, event)
    cuda.synchronize(stream)


@assumed("a pending event", "600 until its stream gets there", DOCUMENTED)
def _(cuda: Gpu) -> None:
    event, stream = cuda.event(), cuda.stream()
    with Gate(cuda, stream):
        cuda.record(event, stream)
        expect((cuda.done(event), cuda.stream_query(stream)), (False, False), "event, stream:")
    cuda.synchronize(stream)
    expect((cuda.done(event), cuda.stream_query(stream)), (True, True), "event, stream:")


@assumed("an event recorded again", "earlier waiters wait for the earlier record", DOCUMENTED)
def _(cuda: Gpu) -> None:
    event, held, free, waiter = cuda.event(), cuda.stream(), cuda.stream(), cuda.stream()
    with Gate(cuda, held) as gate:
        cuda.record(event, held)
        cuda.wait(waiter, event)
        cuda.record(event, free)
        cuda.synchronize(free)
        expect(cuda.done(event), True, "complete as it is now:")
        expect((cuda.stream_query(waiter), gate.expired), (False, False), "waiter done, expired:")
    cuda.synchronize(waiter)


@assumed("an event destroyed while pending", "earlier waiters still wait", DOCUMENTED)
def _(cuda: Gpu) -> None:
    event, held, waiter = cuda.event(), cuda.stream(), cuda.stream()
    with Gate(cuda, held) as gate:
        cuda.record(event, held)
        cuda.wait(waiter, event)
        cuda.event_destroy(event)
        expect((cuda.stream_query(waiter), gate.expired), (False, False), "waiter done, expired:")
    cuda.synchronize(waiter)


@assumed("a stream destroyed while busy", "returns at once; its work continues", DOCUMENTED)
def _(cuda: Gpu) -> None:
    event, held, host = cuda.event(), cuda.stream(), cuda.pinned(PAGE)
    address = filled(cuda, b"xxxxx")
    with Gate(cuda, held) as gate:
        cuda.dtoh(host.address, address, 5, held)
        cuda.record(event, held)
        cuda.stream_destroy(held)
        expect(gate.expired, False, "waited:")
    cuda.event_synchronize(event)
    expect(host[:5], b"xxxxx", "content")


@assumed("the legacy stream and a blocking stream", "wait for each other", DOCUMENTED)
def _(cuda: Gpu) -> None:
    held = cuda.stream(BLOCKING)
    with Gate(cuda, held) as gate:
        store(cuda, cuda.mapped(GRANULE), b"x")
        expect(gate.expired, True, "waited:")


@assumed("the legacy stream and a non-blocking stream", "do not wait", DOCUMENTED)
def _(cuda: Gpu) -> None:
    held = cuda.stream()
    with Gate(cuda, held) as gate:
        cuda.memset(cuda.mapped(GRANULE), 1, 8, LEGACY)
        cuda.synchronize(LEGACY)
        expect(gate.expired, False, "waited:")


@assumed("a call from a host function", "800", DOCUMENTED, alone=True)
def _(cuda: Gpu) -> None:
    stream, got = cuda.stream(), []
    cuda.host_function(stream, lambda: got.append(code(cuda.memory)))
    cuda.synchronize(stream)
    expect(got, [800])


def _beside(name: str, call: Callable[[Gpu], Callable[[], object]], waits: bool) -> None:
    """Add rows for a memory call made while another stream works on other memory."""
    verb, source = ("waits", MEASURED) if waits else ("does not wait", OBSERVED)

    @assumed(f"{name} beside a blocked stream", f"{verb} for it", source)
    def _(cuda: Gpu) -> str:
        ready = call(cuda)
        with Gate(cuda, cuda.stream()) as gate:
            taken = microseconds(ready)
            expect(gate.expired, waits, "waited:")
        return f"{taken:.0f} us"

    @assumed(f"{name} beside copies that run", f"{verb} for them", MEASURED if waits else GUESS)
    def _(cuda: Gpu) -> str:
        ready, stream, event = call(cuda), cuda.stream(), cuda.event()
        address, host = cuda.mapped(_LARGE), cuda.pinned(_LARGE)
        cuda.htod(address, host.address, _LARGE)
        one = microseconds(cuda.htod, address, host.address, _LARGE)
        for _ in range(max(2, int(200_000 / one))):
            cuda.htod(address, host.address, _LARGE, stream)
        cuda.record(event, stream)
        begin = perf_counter()
        taken = microseconds(ready)
        if cuda.done(event) != waits:
            raise Refuted(f"a call of {taken:.0f} us; copies done: {not waits}")
        cuda.synchronize(stream)
        return f"{taken:.0f} us; copies ran {1e6 * (perf_counter() - begin) - taken:.0f} us longer"


def _create(cuda: Gpu) -> Callable[[], object]:
    return lambda: cuda.create(GRANULE, Prop())


def _map(cuda: Gpu) -> Callable[[], object]:
    address, handle = cuda.reserve(GRANULE), cuda.create(GRANULE)
    return lambda: cuda.map(address, GRANULE, handle)


def _set_access(cuda: Gpu) -> Callable[[], object]:
    address = cuda.mapped(GRANULE, 0)
    return lambda: cuda.set_access(address, GRANULE)


def _unmap(cuda: Gpu) -> Callable[[], object]:
    address = cuda.mapped(GRANULE)
    return lambda: cuda.unmap(address, GRANULE)


def _release(cuda: Gpu) -> Callable[[], object]:
    handle = cuda.create(GRANULE)
    return lambda: cuda.release(handle)


def _register(cuda: Gpu) -> Callable[[], object]:
    host = cuda.pinned(PAGE)
    cuda.unregister(host.address)
    return lambda: cuda.register(host.address, PAGE)


def _unregister(cuda: Gpu) -> Callable[[], object]:
    host = cuda.pinned(PAGE)

    def unregister() -> None:
        cuda.unregister(host.address)

    return unregister


for _name, _call in {
    "create": _create,
    "map": _map,
    "set access": _set_access,
    "unmap": _unmap,
    "release": _release,
    "register": _register,
    "unregister": _unregister,
}.items():
    _beside(_name, _call, waits=_call is _unregister)


@assumed("copies of two streams", "a blocked stream does not block the other", DOCUMENTED)
def _(cuda: Gpu) -> None:
    if cuda.attribute(40) < 1:
        raise NotRun("no copy engine beside the kernels (attribute 40)")
    held, other, host = cuda.stream(), cuda.stream(), cuda.pinned(PAGE)
    address = cuda.mapped(GRANULE)
    with Gate(cuda, held) as gate:
        cuda.htod(address, host.address, 8, held)
        cuda.htod(address + PAGE, host.address, 8, other)
        cuda.synchronize(other)
        expect(gate.expired, False, "waited:")
