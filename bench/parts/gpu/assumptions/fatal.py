"""Operations that destroy a context, and calls that still work then. Each row has a process."""

from __future__ import annotations

from collections.abc import Callable

from lib.cuda import CastCall, DigestCall, Gate, Gpu, NotRun, code
from warmserve_rt.testing.cuda_api import PAGE, READ

from . import DOCUMENTED, GRANULE, GUESS, MEASURED, OBSERVED, Refuted, assumed, expect
from .work import filled


def die(cuda: Gpu) -> int:
    """Unmap the source of a pending copy and return the result of waiting for the copy."""
    stream, host, address = cuda.stream(), cuda.pinned(PAGE), filled(cuda, b"bytes")
    with Gate(cuda, stream) as gate:
        cuda.dtoh(host.address, address, 5, stream)
        cuda.unmap(address, GRANULE)
        if gate.expired:
            raise Refuted("an unmap that waited for the stream")
    return code(cuda.synchronize, stream)


@assumed("unmapping memory of a pending copy", "does not wait, and the copy fails with 719",
         MEASURED, alone=True)  # fmt: skip
def _(cuda: Gpu) -> None:
    expect(die(cuda), 719)


@assumed("mapping another granule under a pending copy", "it reads the new one", GUESS, alone=True)
def _(cuda: Gpu) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE), filled(cuda, b"first")
    other, second = cuda.reserve(GRANULE), cuda.create(GRANULE)
    cuda.map(other, GRANULE, second)
    cuda.set_access(other, GRANULE)
    cuda.htod(other, cuda.pinned(PAGE, b"other").address, 5)
    with Gate(cuda, stream):
        cuda.dtoh(host.address, address, 5, stream)
        cuda.unmap(address, GRANULE)
        cuda.map(address, GRANULE, second)
        cuda.set_access(address, GRANULE)
    expect((code(cuda.synchronize, stream), host[:5]), (0, b"other"), "wait, content:")


@assumed("making memory read-only under a pending copy into it", "the copy returns 719", MEASURED,
         alone=True)  # fmt: skip
def _(cuda: Gpu) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE), filled(cuda, b"bytes")
    with Gate(cuda, stream):
        cuda.htod(address, host.address, 5, stream)
        cuda.set_access(address, GRANULE, READ)
    expect(code(cuda.synchronize, stream), 719)


@assumed("a memset of read-only memory", "1 at the call", GUESS, alone=True)
def _(cuda: Gpu) -> None:
    stream, address = cuda.stream(), cuda.mapped(GRANULE, READ)
    result = code(cuda.memset, address, 1, 8, stream)
    expect((result, code(cuda.synchronize, stream)), (1, 0), "call, wait:")


def _cast(cuda: Gpu, target: int, access: int) -> int:
    """Run a kernel that stores to memory with that access; return the result of waiting for it."""
    function = cuda.function(cuda.module(cuda.kernel_image()), "ws_cast")
    source, stream = filled(cuda, bytes(64)), cuda.stream()
    cuda.set_access(target, GRANULE, access)
    cuda.launch(function, CastCall(kind=0, source=source, to=target, count=16), stream)
    return code(cuda.synchronize, stream)


@assumed("a kernel that stores to read-only memory", "fails with 700, which persists", OBSERVED,
         alone=True)  # fmt: skip
def _(cuda: Gpu) -> None:
    first = _cast(cuda, cuda.mapped(GRANULE), READ)
    expect((first, code(cuda.context_synchronize)), (700, 700), "kernel, later:")


@assumed("a kernel that stores to writable memory", "works", DOCUMENTED, alone=True)
def _(cuda: Gpu) -> None:
    expect(_cast(cuda, cuda.mapped(GRANULE), 3), 0)


@assumed("a kernel that loads from read-only memory", "works", OBSERVED, alone=True)
def _(cuda: Gpu) -> None:
    function = cuda.function(cuda.module(cuda.kernel_image()), "ws_granule_digest")
    address, stream, out = filled(cuda, bytes(64)), cuda.stream(), cuda.pinned(PAGE)
    cuda.set_access(address, GRANULE, READ)
    call = DigestCall(source=address, nbytes=64, granule=GRANULE, out=out.address)
    cuda.launch(function, call, stream, threads=1024)
    expect(code(cuda.synchronize, stream), 0)
    if not any(out[:8]):
        raise Refuted("no digest")


@assumed("a kernel that loads from an unmapped address", "fails with 700", DOCUMENTED, alone=True)
def _(cuda: Gpu) -> None:
    function = cuda.function(cuda.module(cuda.kernel_image()), "ws_granule_digest")
    address, stream, out = cuda.reserve(GRANULE), cuda.stream(), cuda.pinned(PAGE)
    call = DigestCall(source=address, nbytes=64, granule=GRANULE, out=out.address)
    cuda.launch(function, call, stream, threads=1024)
    expect(code(cuda.synchronize, stream), 700)


class _Before:
    """Objects made before the context died."""

    def __init__(self, cuda: Gpu) -> None:
        self.stream, self.event, self.host = cuda.stream(), cuda.event(), cuda.pinned(PAGE)
        self.mapped, self.reserved = cuda.mapped(GRANULE), cuda.reserve(GRANULE)
        self.unset = cuda.mapped(GRANULE, 0)
        self.handle, self.spare = cuda.create(GRANULE), cuda.create(GRANULE)
        cuda.record(self.event, self.stream)
        cuda.synchronize(self.stream)


# Each call after the death of the context, and whether it returns the error in the simulator.
_AFTER: dict[str, tuple[bool, Callable[[Gpu, _Before], object]]] = {
    "cuMemUnmap": (False, lambda c, b: c.unmap(b.mapped, GRANULE)),
    "cuMemRelease": (False, lambda c, b: c.release(b.spare)),
    "cuMemAddressFree": (False, lambda c, b: c.address_free(b.reserved, GRANULE)),
    "cuMemCreate": (False, lambda c, _: c.create(GRANULE)),
    "cuMemAddressReserve": (False, lambda c, _: c.reserve(GRANULE)),
    "cuMemMap": (False, lambda c, b: c.map(b.reserved, GRANULE, b.handle)),
    "cuMemSetAccess": (False, lambda c, b: c.set_access(b.unset, GRANULE)),
    "cuMemHostRegister": (True, lambda c, _: c.pinned(PAGE)),
    "cuMemHostUnregister": (True, lambda c, b: c.unregister(b.host.address)),
    "cuMemGetInfo": (True, lambda c, _: c.memory()),
    "cuStreamCreate": (True, lambda c, _: c.stream()),
    "cuStreamDestroy": (True, lambda c, b: c.stream_destroy(b.stream)),
    "cuStreamSynchronize": (True, lambda c, b: c.synchronize(b.stream)),
    "cuEventCreate": (True, lambda c, _: c.event()),
    "cuEventDestroy": (True, lambda c, b: c.event_destroy(b.event)),
    "cuEventQuery": (True, lambda c, b: c.done(b.event)),
    "cuEventRecord": (True, lambda c, b: c.record(b.event, b.stream)),
    "cuMemcpyHtoDAsync": (True, lambda c, b: c.htod(b.mapped, b.host.address, 8, b.stream)),
    "cuCtxSynchronize": (True, lambda c, _: c.context_synchronize()),
    "cuCtxSetCurrent": (False, lambda c, _: c.set_current(c.current())),
    "cuThreadExchangeStreamCaptureMode": (False, lambda c, _: c.exchange_mode(0)),
    "cuDevicePrimaryCtxRelease": (False, lambda c, _: c.release_primary()),
}


def _after(name: str, says: bool, call: Callable[[Gpu, _Before], object]) -> None:
    assumes = "returns the error that killed the context" if says else "works"

    @assumed(f"after a death: {name}", assumes, GUESS, alone=True)
    def _(cuda: Gpu) -> None:
        before = _Before(cuda)
        try:
            died = die(cuda)
        except Refuted as error:
            raise NotRun(f"the context did not die: {error}") from None
        if died == 0:
            raise NotRun("the context did not die")
        expect(code(call, cuda, before), died if says else 0)


for _name, (_says, _call) in _AFTER.items():
    _after(_name, _says, _call)
