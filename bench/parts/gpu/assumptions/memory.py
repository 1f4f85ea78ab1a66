"""Virtual memory: mappings, the lifetime of memory, and attributes of addresses."""

from __future__ import annotations

import ctypes
import os

from lib.cuda import CudaError, Gpu, NotRun, code, size_t
from warmserve_rt.testing.cuda_api import NONE, PAGE, READ
from warmserve_rt.testing.cuda_types import Prop, i32, pointer, u64

from . import DOCUMENTED, GRANULE, GUESS, MEASURED, OBSERVED, Refuted, assumed, expect

_FABRIC, _POSIX_FD = 8, 1
_HOST = 1 << 30


def content(cuda: Gpu, address: int, nbytes: int = 4) -> bytes:
    host = cuda.pinned(PAGE)
    cuda.dtoh(host.address, address, nbytes)
    return host[:nbytes]


def store(cuda: Gpu, address: int, what: bytes) -> None:
    cuda.htod(address, cuda.pinned(PAGE, what).address, len(what))


@assumed("granularity", "2 MiB, minimum and recommended", OBSERVED)
def _(cuda: Gpu) -> None:
    expect([cuda.granularity(0), cuda.granularity(1)], [GRANULE, GRANULE])


@assumed("mapping grants nothing", "no access until it is set", DOCUMENTED)
def _(cuda: Gpu) -> None:
    address = cuda.mapped(GRANULE, NONE)
    expect(cuda.get_access(address), NONE, "access")


@assumed("memory outlives its release", "bytes stay while it is mapped somewhere", DOCUMENTED)
def _(cuda: Gpu) -> None:
    handle, address, alias = cuda.create(GRANULE), cuda.reserve(GRANULE), cuda.reserve(GRANULE)
    for at in (address, alias):
        cuda.map(at, GRANULE, handle)
        cuda.set_access(at, GRANULE)
    cuda.release(handle)
    store(cuda, address, b"kept")
    cuda.unmap(address, GRANULE)
    expect(content(cuda, alias), b"kept", "content")


@assumed("content survives a remap", "a granule mapped elsewhere keeps its bytes", DOCUMENTED)
def _(cuda: Gpu) -> None:
    handle, address, other = cuda.create(GRANULE), cuda.reserve(GRANULE), cuda.reserve(GRANULE)
    cuda.map(address, GRANULE, handle)
    cuda.set_access(address, GRANULE)
    store(cuda, address, b"kept")
    cuda.unmap(address, GRANULE)
    cuda.map(other, GRANULE, handle)
    expect(cuda.get_access(other), NONE, "access of the new mapping")
    cuda.set_access(other, GRANULE, READ)
    expect(content(cuda, other), b"kept", "content")


@assumed("read-write becomes read-only in place", "readable, and a copy into it: 1", OBSERVED)
def _(cuda: Gpu) -> None:
    address, host = cuda.mapped(GRANULE), cuda.pinned(PAGE, b"lost")
    store(cuda, address, b"kept")
    cuda.set_access(address, GRANULE, READ)
    expect(cuda.get_access(address), READ, "access")
    expect(code(cuda.htod, address, host.address, 4), 1, "from the copy:")
    expect(content(cuda, address), b"kept", "content")


@assumed("read-only becomes read-write in place", "a copy into it works then", GUESS)
def _(cuda: Gpu) -> None:
    address = cuda.mapped(GRANULE, READ)
    cuda.set_access(address, GRANULE)
    store(cuda, address, b"more")
    expect(content(cuda, address), b"more", "content")


@assumed("an asynchronous copy into read-only memory", "1 at the call", OBSERVED, alone=True)
def _(cuda: Gpu) -> None:
    address, host, stream = cuda.mapped(GRANULE, READ), cuda.pinned(PAGE), cuda.stream()
    result = code(cuda.htod, address, host.address, 4, stream)
    expect((result, code(cuda.synchronize, stream)), (1, 0), "call, wait:")


@assumed("an asynchronous copy to an unmapped address", "1 at the call", GUESS, alone=True)
def _(cuda: Gpu) -> None:
    address, host, stream = cuda.reserve(GRANULE), cuda.pinned(PAGE), cuda.stream()
    result = code(cuda.htod, address, host.address, 4, stream)
    expect((result, code(cuda.synchronize, stream)), (1, 0), "call, wait:")


@assumed("a copy across two mappings", "one copy may span them", OBSERVED)
def _(cuda: Gpu) -> None:
    address = cuda.reserve(2 * GRANULE)
    for at in (address, address + GRANULE):
        cuda.map(at, GRANULE, cuda.create(GRANULE))
    cuda.set_access(address, 2 * GRANULE)
    store(cuda, address + GRANULE - 2, b"both")
    expect(content(cuda, address + GRANULE - 2), b"both", "content")


@assumed("creating granules reduces the free memory", "by exactly their bytes", GUESS, alone=True)
def _(cuda: Gpu) -> None:
    free = cuda.memory()[0]
    handles = [cuda.create(GRANULE) for _ in range(16)]
    less = free - cuda.memory()[0]
    for handle in handles:
        cuda.release(handle)
    expect((less, free - cuda.memory()[0]), (16 * GRANULE, 0), "taken, then still taken:")


@assumed("exhaustion", "creating too much returns 2 and breaks nothing", DOCUMENTED, alone=True)
def _(cuda: Gpu) -> str:
    free = cuda.memory()[0]
    handles: list[int] = []
    try:
        while len(handles) * _HOST <= free:
            handles.append(cuda.create(_HOST))
    except CudaError as error:
        expect(error.code, 2, "code")
    else:
        raise Refuted("more memory than is free")
    left = cuda.memory()[0]
    for handle in handles:
        cuda.release(handle)
    store(cuda, cuda.mapped(GRANULE), b"fine")
    return f"{len(handles)} GiB of {free / _HOST:.2f} were created, {left >> 20} MiB were left"


@assumed("VMM without a current context", "every call works", GUESS, alone=True)
def _(cuda: Gpu) -> None:
    cuda.set_current(0)
    address, handle = cuda.reserve(GRANULE), cuda.create(GRANULE)
    cuda.map(address, GRANULE, handle)
    cuda.set_access(address, GRANULE)
    cuda.unmap(address, GRANULE)
    cuda.release(handle)
    cuda.address_free(address, GRANULE)


@assumed("a granule for export and for network cards", "created with both attributes", DOCUMENTED)
def _(cuda: Gpu) -> str:
    if not cuda.attribute(103):
        raise NotRun("no handles as file descriptors (attribute 103)")
    rdma = cuda.attribute(110)
    prop = Prop()
    prop.handle_types = _POSIX_FD
    prop.flags[1] = rdma
    handle, address = cuda.create(GRANULE, prop), cuda.reserve(GRANULE)
    cuda.map(address, GRANULE, handle)
    cuda.set_access(address, GRANULE)
    expect(cuda.pointer_attribute(15, address, i32), rdma, "attribute 15")
    expect(cuda.pointer_attribute(14, address) & _POSIX_FD, _POSIX_FD, "attribute 14")
    fd = cuda.export(handle)
    closed_on_exec = not os.get_inheritable(fd)
    imported = cuda.out("cuMemImportFromShareableHandle", fd, _POSIX_FD)
    os.close(fd)
    alias = cuda.reserve(GRANULE)
    cuda.map(alias, GRANULE, imported)
    cuda.set_access(alias, GRANULE)
    store(cuda, address, b"same")
    expect(content(cuda, alias), b"same", "content of the import")
    expect(closed_on_exec, True, "close-on-exec")
    return f"RDMA {'granted' if rdma else 'not offered'}"


@assumed("a granule for the fabric", "800 or 801 without IMEX, or it works", OBSERVED)
def _(cuda: Gpu) -> str:
    prop = Prop()
    prop.handle_types = _FABRIC
    result = code(cuda.create, GRANULE, prop)
    if result not in (0, 800, 801):
        raise Refuted(str(result))
    return f"attribute 128 is {cuda.attribute(128)}, create returned {result}"


def _three_reserved(cuda: Gpu) -> tuple[int, int]:
    """Reserve three granules of addresses and map the middle one; return both begins."""
    address = cuda.reserve(3 * GRANULE)
    cuda.map(address + GRANULE, GRANULE, cuda.create(GRANULE))
    cuda.set_access(address + GRANULE, GRANULE)
    return address, address + GRANULE


def _pointer(name: str, assumes: str, source: str, attribute: int, kind: type, wanted: str) -> None:
    @assumed(f"pointer attribute: {name}", assumes, source)
    def _(cuda: Gpu) -> None:
        begin, mapped = _three_reserved(cuda)
        values = {"reservation": begin, "whole": 3 * GRANULE, "mapping": mapped, "here": mapped + 9}
        known = values[wanted] if wanted in values else int(wanted)
        got = cuda.pointer_attribute(attribute, mapped + 9, kind)
        by_value = {value: name for name, value in values.items()}
        expect(by_value.get(got, got), by_value.get(known, known))


_pointer("range start", "the reservation's", OBSERVED, 11, u64, "reservation")
_pointer("range size", "the reservation's", OBSERVED, 12, size_t, "whole")
_pointer("mapped", "1", DOCUMENTED, 13, ctypes.c_ubyte, "1")
_pointer("memory type", "2, the device's", DOCUMENTED, 2, i32, "2")
_pointer("device ordinal", "0", DOCUMENTED, 9, i32, "0")
_pointer("device pointer", "the address", DOCUMENTED, 3, u64, "here")
_pointer("access", "3, read and write", DOCUMENTED, 16, i32, "3")
_pointer("context", "null: mapped memory belongs to no context", GUESS, 1, u64, "0")
_pointer("legacy IPC", "0", OBSERVED, 10, i32, "0")


@assumed("pointer attribute: mapped, of a hole", "1, as for memory unknown to CUDA", MEASURED)
def _(cuda: Gpu) -> None:
    begin, _mapped = _three_reserved(cuda)
    expect(code(cuda.pointer_attribute, 13, begin, ctypes.c_ubyte), 1)


@assumed("address range of mapped memory", "the mapping", DOCUMENTED)
def _(cuda: Gpu) -> None:
    begin, mapped = _three_reserved(cuda)
    base, size = u64(), size_t()
    cuda.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), mapped + 9)
    expect((base.value - begin, size.value), (GRANULE, GRANULE), "offset and size")


@assumed("address range of a hole", "500", GUESS)
def _(cuda: Gpu) -> None:
    begin, _mapped = _three_reserved(cuda)
    outs = [ctypes.byref(out) for out in (u64(), size_t())]
    expect(code(cuda.call, "cuMemGetAddressRange_v2", *outs, begin), 500)


@assumed("attributes of an address unknown to CUDA", "no error, and zeros", DOCUMENTED)
def _(cuda: Gpu) -> None:
    kinds = (i32 * 2)(2, 9)
    values = [i32(7), i32(7)]
    outs = (pointer * 2)(*[ctypes.addressof(value) for value in values])
    foreign = ctypes.create_string_buffer(64)
    cuda.call("cuPointerGetAttributes", 2, kinds, outs, ctypes.addressof(foreign))
    expect(values[0].value, 0, "memory type")
