"""Misuses of the driver API, and legal calls that look like misuse, with the answer of each.

The simulated driver gives these answers (tests/simcuda/test_simcuda_misuse.py), and codes.py asks a
device for them. The last column gives the source of the answer: D, documented; O, observed on GPUs
by others; M, measured on an H200; guess, none of these. An H200 gave each of these answers, except
in rows that call a device lenient, and in the rows of SHARING, which no device was asked yet.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import NamedTuple

from warmserve_rt.testing.cuda_api import NONE, PAGE, POSIX_FD, READ, Cuda
from warmserve_rt.testing.cuda_types import Prop

G = 2 << 20
NOT_RESERVED = 0x10_0000_0000
D, O, M, GUESS = "D", "O", "M", "guess"  # noqa: E741
OK = ""


class Row(NamedTuple):
    name: str
    calls: Callable[[Cuda], object]
    function: str  # the function that fails; OK if none fails
    error: int
    source: str
    lenient: bool = False  # documented as forbidden and refused here, but a GPU allows it


def two_mappings(c: Cuda, gap: int = 0) -> int:
    """Map two granules one by one, ``gap`` bytes apart; return the address of the first."""
    address = c.reserve(4 * G)
    for at in (address, address + G + gap):
        c.map(at, G, c.create(G))
    return address


def map_again(c: Cuda) -> None:
    c.map(c.mapped(G), G, c.create(G))


def map_past_the_end(c: Cuda) -> None:
    c.map(c.reserve(G), 2 * G, c.create(2 * G))


def twice_mapped(c: Cuda) -> None:
    handle, address = c.create(G), c.reserve(2 * G)
    for at in (address, address + G):
        c.map(at, G, handle)
    c.set_access(address, 2 * G)


def copy_into(c: Cuda, access: int, stream: int | None) -> None:
    host = c.pinned(PAGE)
    c.htod(c.mapped(G, access), host.address, 10, stream)


def synchronous_memops(c: Cuda) -> None:
    value = ctypes.byref(ctypes.c_int(1))
    c.call("cuPointerSetAttribute", value, 6, c.mapped(G))


RESERVE, FREE = "cuMemAddressReserve", "cuMemAddressFree"
CREATE, RELEASE = "cuMemCreate", "cuMemRelease"
MAP, UNMAP, ACCESS = "cuMemMap", "cuMemUnmap", "cuMemSetAccess"
MEMORY = [
    Row("reserve nothing", lambda c: c.reserve(0), RESERVE, 1, M),
    Row("reserve part of a page", lambda c: c.reserve(G - 1), RESERVE, 1, M),
    Row("reserve aligned to 3", lambda c: c.reserve(G, 3), RESERVE, 1, M),
    Row("reserve without out", lambda c: c.call(RESERVE, None, G, 0, 0, 0), RESERVE, 1, O),
    Row("reserve with flags", lambda c: c.reserve(G, flags=1), RESERVE, 1, GUESS),
    Row("reserve 16 TiB", lambda c: c.reserve(1 << 44), OK, 0, O),
    Row("reserve with a hint", lambda c: c.reserve(G, hint=NOT_RESERVED), OK, 0, D),
    Row("free null", lambda c: c.address_free(0, G), FREE, 1, O),
    Row("free nothing", lambda c: c.address_free(c.reserve(G), 0), FREE, 1, O),
    Row("free more", lambda c: c.address_free(c.reserve(G), 2 * G), FREE, 1, D),
    Row("free less", lambda c: c.address_free(c.reserve(2 * G), G), FREE, 1, D),
    Row("free the second half", lambda c: c.address_free(c.reserve(2 * G) + G, G), FREE, 1, D),
    Row("free while mapped", lambda c: c.address_free(c.mapped(G), G), FREE, 1, GUESS),
    Row("create without out", lambda c: c.call(CREATE, None, G, None, 0), CREATE, 1, O),
    Row("create nothing", lambda c: c.create(0), CREATE, 1, O),
    Row("create part of a granule", lambda c: c.create(G + PAGE), CREATE, 1, O),
    Row("create of no type", lambda c: c.create(G, Prop(type=0)), CREATE, 1, O),
    Row("create nowhere", lambda c: c.create(G, Prop(location=0)), CREATE, 1, O),
    Row("create on device 7", lambda c: c.create(G, Prop(id=7)), CREATE, 101, M),
    Row("create on device -1", lambda c: c.create(G, Prop(id=-1)), CREATE, 101, M),
    Row("create on this NUMA node", lambda c: c.create(G, Prop(location=4)), CREATE, 1, D),
    Row("create with flags", lambda c: c.create(G, flags=1), CREATE, 1, D),
    Row("create too much", lambda c: c.create(66 << 20), CREATE, 2, D),
    Row("release null", lambda c: c.release(0), RELEASE, 1, O),
    Row("release while mapped", lambda c: c.htod(c.mapped(G), c.pinned(PAGE).address, 9), OK, 0, D),
    Row("map at an offset", lambda c: c.map(c.reserve(G), G, c.create(2 * G), G), MAP, 801, M),
    Row("map with flags", lambda c: c.map(c.reserve(G), G, c.create(G), flags=1), MAP, 1, D),
    Row("map over a mapping", map_again, MAP, 1, GUESS),
    Row("map what is not reserved", lambda c: c.map(NOT_RESERVED, G, c.create(G)), MAP, 1, GUESS),
    Row("map past the end", map_past_the_end, MAP, 1, GUESS, True),
    Row("map more than it has", lambda c: c.map(c.reserve(2 * G), 2 * G, c.create(G)), MAP, 801, M),
    Row("map a part", lambda c: c.map(c.reserve(2 * G), G, c.create(2 * G)), MAP, 801, M),
    Row("map unaligned", lambda c: c.map(c.reserve(2 * G) + PAGE, G, c.create(G)), MAP, 1, D),
    Row("map nothing", lambda c: c.map(c.reserve(G), 0, c.create(G)), MAP, 1, GUESS),
    Row("map no handle", lambda c: c.map(c.reserve(G), G, 0), MAP, 1, GUESS),
    Row("map one handle twice", twice_mapped, OK, 0, D),
    Row("unmap one byte less", lambda c: c.unmap(c.mapped(G), G - 1), UNMAP, 1, O),
    Row("unmap nothing", lambda c: c.unmap(c.mapped(G), 0), UNMAP, 1, O),
    Row("unmap null", lambda c: c.unmap(0, G), UNMAP, 1, O),
    Row("unmap what is not mapped", lambda c: c.unmap(c.reserve(G), G), UNMAP, 1, O, True),
    Row("unmap the first half", lambda c: c.unmap(c.mapped(2 * G), G), UNMAP, 1, D),
    Row("unmap the second half", lambda c: c.unmap(c.mapped(2 * G) + G, G), UNMAP, 1, D),
    Row("unmap two mappings", lambda c: c.unmap(two_mappings(c), 2 * G), OK, 0, O),
    Row("unmap across a hole", lambda c: c.unmap(two_mappings(c, G), 3 * G), UNMAP, 1, GUESS, True),
    Row("access to two mappings", lambda c: c.set_access(two_mappings(c), 2 * G), OK, 0, D),
    Row("access to a hole", lambda c: c.set_access(two_mappings(c, G), 3 * G), ACCESS, 1, D, True),
    Row("access past the end", lambda c: c.set_access(c.mapped(G), 2 * G), ACCESS, 1, D),
    Row("access unreserved", lambda c: c.set_access(NOT_RESERVED, G), ACCESS, 1, O),
    Row("access unmapped", lambda c: c.set_access(c.reserve(G), G), ACCESS, 1, D),
    Row("access to a part", lambda c: c.set_access(c.mapped(2 * G), G), ACCESS, 1, GUESS),
    Row("access made less", lambda c: c.set_access(c.mapped(G), G, READ), OK, 0, O),
    Row("copy into read-only", lambda c: copy_into(c, READ, None), "cuMemcpyHtoD_v2", 1, O),
    Row("copy into no access", lambda c: copy_into(c, NONE, None), "cuMemcpyHtoD_v2", 1, O),
    Row("get access of null", lambda c: c.get_access(0), "cuMemGetAccess", 1, O),
    Row("get access past", lambda c: c.get_access(c.mapped(G) + G), "cuMemGetAccess", 1, O),
    Row("retain from within", lambda c: c.release(c.retain_handle(c.mapped(G) + G - 1)), OK, 0, O),
    Row(
        "retain unmapped",
        lambda c: c.retain_handle(c.reserve(G)),
        "cuMemRetainAllocationHandle",
        1,
        O,
    ),
    Row("make copies synchronous", synchronous_memops, "cuPointerSetAttribute", 801, O),
    Row("granularity of 7", lambda c: c.granularity(7), "cuMemGetAllocationGranularity", 1, O),
    Row("granularity of device 7", lambda c: c.granularity(prop=Prop(id=7)), OK, 0, O),
    Row("granularity of no type", lambda c: c.granularity(prop=Prop(type=0)), OK, 0, O),
]


EXPORT, IMPORT = "cuMemExportToShareableHandle", "cuMemImportFromShareableHandle"
FABRIC = 8  # a type of handles


def shared(c: Cuda, nbytes: int = G) -> tuple[int, int]:
    """Create an allocation that other processes can import; return its handle and a descriptor."""
    prop = Prop()
    prop.handle_types = POSIX_FD
    handle = c.create(nbytes, prop)
    return handle, c.export(handle)


def imported(c: Cuda, descriptor: int, kind: int = POSIX_FD, *, close: bool = True) -> int:
    try:
        return c.imported(descriptor, kind)
    finally:
        if close:
            os.close(descriptor)


def import_twice(c: Cuda) -> None:
    _, descriptor = shared(c)
    for close in (False, True):
        c.map(c.reserve(G), G, imported(c, descriptor, close=close))


def import_a_foreign_file(c: Cuda) -> None:
    descriptor = os.memfd_create("foreign", os.MFD_CLOEXEC)
    os.truncate(descriptor, G)
    imported(c, descriptor)


def import_what_was_released(c: Cuda) -> None:
    handle, descriptor = shared(c)
    c.release(handle)
    c.map(c.reserve(G), G, imported(c, descriptor))


def write_an_import(c: Cuda) -> None:
    address = c.reserve(G)
    c.map(address, G, imported(c, shared(c)[1]))
    c.set_access(address, G)
    c.htod(address, c.pinned(PAGE).address, 10)


def map_an_import(c: Cuda, nbytes: int) -> None:
    c.map(c.reserve(4 * G), nbytes, imported(c, shared(c, 2 * G)[1]))


def export(c: Cuda, handle: int, kind: int, flags: int = 0) -> None:
    os.close(c.export(handle, kind, flags))


def export_of(c: Cuda, kind: int, flags: int = 0) -> None:
    handle, descriptor = shared(c)
    os.close(descriptor)
    export(c, handle, kind, flags)


SHARING = [
    Row("export", lambda c: export_of(c, POSIX_FD), OK, 0, D),
    Row("export what is private", lambda c: export(c, c.create(G), POSIX_FD), EXPORT, 1, GUESS),
    Row("export no handle", lambda c: export(c, 0, POSIX_FD), EXPORT, 1, GUESS),
    Row("export with flags", lambda c: export_of(c, POSIX_FD, 1), EXPORT, 1, D),
    Row("export as another type", lambda c: export_of(c, FABRIC), EXPORT, 1, GUESS),
    Row("import twice", import_twice, OK, 0, GUESS),
    Row("import after the release", import_what_was_released, OK, 0, GUESS),
    Row("import a foreign file", import_a_foreign_file, IMPORT, 1, GUESS),
    Row("import what is closed", lambda c: imported(c, -1, close=False), IMPORT, 1, GUESS),
    Row("import as another type", lambda c: imported(c, shared(c)[1], FABRIC), IMPORT, 1, GUESS),
    Row("map an import", lambda c: map_an_import(c, 2 * G), OK, 0, D),
    Row("map less than an import", lambda c: map_an_import(c, G), MAP, 801, GUESS),
    Row("map more than an import", lambda c: map_an_import(c, 4 * G), MAP, 801, GUESS),
    Row("write an import", write_an_import, OK, 0, D),
]


def register_beside(c: Cuda, at: int, nbytes: int) -> None:
    held = c.pinned(4 * PAGE)
    c.unregister(held.address)
    c.register(held.address + PAGE, PAGE + 100)
    c.register(held.address + at, nbytes)


def unregister(c: Cuda, offset: int) -> None:
    held = c.pinned(2 * PAGE)
    c.unregister(held.address + offset)


REGISTER, UNREGISTER = "cuMemHostRegister_v2", "cuMemHostUnregister"
HOST = [
    Row("register nothing", lambda c: register_beside(c, 0, 0), REGISTER, 1, O),
    Row("register null", lambda c: c.register(0, PAGE), REGISTER, 1, GUESS),
    Row("register twice", lambda c: register_beside(c, PAGE, PAGE + 100), REGISTER, 712, O),
    Row("register the end again", lambda c: register_beside(c, PAGE + 90, PAGE), REGISTER, 712, O),
    Row("register one page's rest", lambda c: register_beside(c, 2 * PAGE + 100, 9), OK, 0, O),
    Row("register unaligned", lambda c: register_beside(c, 3 * PAGE + 1, 100), OK, 0, O),
    Row("unregister", lambda c: unregister(c, 0), OK, 0, D),
    Row("unregister from within", lambda c: unregister(c, PAGE), UNREGISTER, 1, O),
    Row("unregister null", lambda c: c.unregister(0), UNREGISTER, 1, O),
    Row("unregister unknown", lambda c: c.unregister(NOT_RESERVED), UNREGISTER, 713, O),
    Row("unregister host_alloc", lambda c: c.unregister(c.host_alloc(PAGE)), UNREGISTER, 1, O),
    Row("allocate nothing", lambda c: c.host_alloc(0), OK, 0, O),
    Row("free host null", lambda c: c.free_host(0), OK, 0, O),
]


def busy_event(c: Cuda) -> int:
    stream, event = c.stream(), c.event()
    c.memset(c.mapped(G), 1, G, stream)
    c.record(event, stream)
    return event


def event_of_another_context(c: Cuda) -> None:
    event, first = c.event(), c.current()
    c.set_current(c.retain_primary(1))
    assert c.current() != first
    c.record(event, c.stream())


def no_context(c: Cuda, call: Callable[[], object]) -> None:
    c.set_current(0)
    call()


LOAD = "cuModuleLoadData"
PTX = b".version 7.0\n.target sm_75\n.address_size 64\n"  # an image without functions
WORK = [
    Row("event of another context", event_of_another_context, "cuEventRecord", 400, D),
    Row("query of nothing", lambda c: c.done(0), "cuEventQuery", 400, GUESS),
    Row("destroy a pending event", lambda c: c.event_destroy(busy_event(c)), OK, 0, D),
    Row("wait for what never was", lambda c: c.wait(c.stream(), c.event()), OK, 0, D),
    Row("priority out of range", lambda c: c.stream_destroy(c.stream(priority=-99)), OK, 0, D),
    Row("no such device", lambda c: c.device(7), "cuDeviceGet", 101, D),
    Row("device -1", lambda c: c.device(-1), "cuDeviceGet", 101, D),
    Row("init with flags", lambda c: c.init(1), "cuInit", 1, D),
    Row("init twice", lambda c: c.init(), OK, 0, D),
    Row("memory without context", lambda c: no_context(c, c.memory), "cuMemGetInfo_v2", 201, D),
    Row("event without context", lambda c: no_context(c, c.event), "cuEventCreate", 201, D),
    Row(
        "stream without context",
        lambda c: no_context(c, c.stream),
        "cuStreamCreateWithPriority",
        201,
        D,
    ),
    Row("load nothing", lambda c: c.call("cuModuleLoadData", None, None), LOAD, 1, D),
    Row("load what is no image", lambda c: c.module(b"any"), LOAD, 200, M),
    Row("no such kernel", lambda c: c.function(c.module(PTX), "k"), "cuModuleGetFunction", 500, D),
]
