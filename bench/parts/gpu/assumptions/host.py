"""Host memory: which memory can be pinned, and the properties of a pinned address."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import tempfile

from lib.cuda import Gpu, NotRun, code
from parts.gpu.host_memory import (
    DONTFORK,
    HUGEPAGE,
    HUGETLB,
    NORESERVE,
    POPULATE_WRITE,
    advise,
    mapped,
    memfd,
)
from warmserve_rt.testing.cuda_api import PAGE

from . import DOCUMENTED, GRANULE, GUESS, MEASURED, OBSERVED, Refuted, assumed, expect
from .memory import content

_PORTABLE_MAPPED, _READ_ONLY = 3, 8
_NBYTES = 16 << 20


def pins(cuda: Gpu, address: int, nbytes: int, flags: int = _PORTABLE_MAPPED) -> None:
    """Register memory, check a copy of its last bytes to the device, and unregister it."""
    cuda.register(address, nbytes, flags)
    if not flags & _READ_ONLY:
        ctypes.memmove(address + nbytes - 4, b"here", 4)
    wanted = ctypes.string_at(address + nbytes - 4, 4)
    device = cuda.mapped(GRANULE)
    cuda.htod(device, address + nbytes - 4, 4)
    expect(content(cuda, device), wanted, "content")
    cuda.unregister(address)


@assumed("pinning as the runtime does", "huge, touched, MADV_DONTFORK", OBSERVED)
def _(cuda: Gpu) -> None:
    address = mapped(_NBYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    for advice in (HUGEPAGE, DONTFORK, POPULATE_WRITE):
        advise(address, _NBYTES, advice)
    pins(cuda, address, _NBYTES)


@assumed("pinning memory that was never touched", "works, and populates it", GUESS)
def _(cuda: Gpu) -> None:
    pins(cuda, mapped(_NBYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), _NBYTES)


@assumed("pinning a memfd", "works", GUESS)
def _(cuda: Gpu) -> None:
    with memfd(_NBYTES) as fd:
        pins(cuda, mapped(_NBYTES, mmap.MAP_SHARED, fd), _NBYTES)


@assumed("pinning pages of hugetlbfs", "works", GUESS)
def _(cuda: Gpu) -> None:
    pins(cuda, mapped(_NBYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | HUGETLB), _NBYTES)


@assumed("pinning a file's page cache to write to it", "1: Linux keeps no such pin", MEASURED)
def _(cuda: Gpu) -> None:
    if cuda.simulated:
        raise NotRun("the simulated driver keeps one")
    with tempfile.TemporaryFile() as file:
        file.truncate(_NBYTES)
        expect(code(cuda.register, mapped(_NBYTES, mmap.MAP_SHARED, file.fileno()), _NBYTES), 1)


@assumed("pinning a file for reading alone", "works with READ_ONLY (attribute 113)", DOCUMENTED)
def _(cuda: Gpu) -> None:
    if not cuda.attribute(113):
        raise NotRun("attribute 113 is 0")
    with tempfile.TemporaryFile() as file:
        file.write(bytes(_NBYTES - 4) + b"disk")
        file.flush()
        address = mapped(_NBYTES, mmap.MAP_SHARED, file.fileno(), mmap.PROT_READ)
        pins(cuda, address, _NBYTES, _READ_ONLY)


@assumed("pinning memory that cannot be written", "1 without READ_ONLY", DOCUMENTED)
def _(cuda: Gpu) -> None:
    with memfd(PAGE) as fd:
        address = mapped(PAGE, mmap.MAP_SHARED, fd, mmap.PROT_READ)
        expect(code(cuda.register, address, PAGE), 1)


@assumed("pinning beyond RLIMIT_MEMLOCK", "works: the limit is not the driver's", GUESS, alone=True)
def _(cuda: Gpu) -> str:
    before = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (64 << 10, before[1]))
    pins(cuda, mapped(_NBYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), _NBYTES)
    privileged = os.geteuid() == 0
    return "as root, for whom the limit does not apply" if privileged else "as an ordinary user"


@assumed("a pinned address on the device", "is the same address", DOCUMENTED)
def _(cuda: Gpu) -> None:
    host = cuda.pinned(PAGE)
    got = cuda.out("cuMemHostGetDevicePointer_v2", host.address, 0)
    if got != host.address:
        raise Refuted("another address")


@assumed("pinned memory's type", "1, the host's", DOCUMENTED)
def _(cuda: Gpu) -> None:
    host = cuda.pinned(PAGE)
    expect(cuda.pointer_attribute(2, host.address, ctypes.c_int), 1)
