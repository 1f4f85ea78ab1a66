"""Memory of this process of every kind that can be pinned.

It stays mapped until the process ends, because pinned memory must not be unmapped earlier.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from lib.cuda import NotRun
from lib.harness import MIB

HUGEPAGE, NOHUGEPAGE, DONTFORK, POPULATE_READ, POPULATE_WRITE = 14, 15, 10, 22, 23
HUGETLB, NORESERVE = 0x40000, 0x4000
HUGE = 2 * MIB
_MBIND = {"x86_64": 237, "aarch64": 235}  # numbers of the system call
_BIND = 2
_NODES = Path("/sys/devices/system/node")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.syscall.restype = ctypes.c_long


def mapped(nbytes: int, flags: int, fd: int = -1, protection: int = 3) -> int:
    address = _libc.mmap(None, nbytes, protection, flags, fd, 0)
    if address == ctypes.c_void_p(-1).value:
        raise NotRun(f"mmap: {os.strerror(ctypes.get_errno())}")
    return int(address)


def advise(address: int, nbytes: int, advice: int) -> bool:
    """Return whether the kernel takes the advice."""
    return not _libc.madvise(address, nbytes, advice)


def touch(address: int, nbytes: int, advice: int) -> None:
    """Populate memory, by POPULATE_READ or POPULATE_WRITE."""
    if not advise(address, nbytes, advice):
        raise NotRun(f"madvise {advice}: {os.strerror(ctypes.get_errno())}")


@contextmanager
def memfd(nbytes: int) -> Iterator[int]:
    fd = os.memfd_create("warmserve-bench")
    try:
        os.ftruncate(fd, nbytes)
        yield fd
    finally:
        os.close(fd)


def anonymous(nbytes: int, node: int | None = None) -> int:
    """Return touched private memory, in huge pages if the kernel has them, on a NUMA node."""
    whole = mapped(nbytes + HUGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE)
    address = -(-whole // HUGE) * HUGE
    advise(address, nbytes, HUGEPAGE)
    if node is not None:
        bind(address, nbytes, node)
    touch(address, nbytes, POPULATE_WRITE)
    return address


def shared(nbytes: int, huge: bool) -> int:
    """Return touched memory of a memfd; `huge` asks for huge pages."""
    with memfd(nbytes) as fd:
        address = mapped(nbytes, mmap.MAP_SHARED, fd)
    advise(address, nbytes, HUGEPAGE if huge else NOHUGEPAGE)
    touch(address, nbytes, POPULATE_WRITE)
    return address


def write_random(file: IO[bytes], nbytes: int) -> None:
    """Write whole MiB to a file and its disk: later write-back would disturb measurements."""
    block = os.urandom(MIB)
    for _ in range(nbytes // MIB):
        file.write(block)
    file.flush()
    os.fsync(file.fileno())


def page_cache(nbytes: int, folder: Path) -> int:
    """Return the page cache of a new file, mapped for reading only."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            write_random(file, nbytes)
            address = mapped(nbytes, mmap.MAP_SHARED, file.fileno(), mmap.PROT_READ)
    except OSError as error:
        raise NotRun(f"{folder}: {error}") from None
    touch(address, nbytes, POPULATE_READ)
    return address


def nodes() -> list[int]:
    """Return the NUMA nodes that have memory."""
    found = []
    for path in _NODES.glob("node[0-9]*/meminfo"):
        total = next((line for line in path.read_text().splitlines() if "MemTotal" in line), "")
        if total and int(total.split()[-2]) > 0:
            found.append(int(path.parent.name[4:]))
    return sorted(found)


def bind(address: int, nbytes: int, node: int) -> None:
    """Let memory that is not yet touched come from one NUMA node."""
    if (number := _MBIND.get(platform.machine())) is None:
        raise NotRun(f"mbind is unknown on {platform.machine()}")
    mask = ctypes.c_ulong(1 << node)
    arguments = (address, nbytes, _BIND, ctypes.addressof(mask), 64, 0)
    if _libc.syscall(ctypes.c_long(number), *map(ctypes.c_ulong, arguments)):
        raise NotRun(f"mbind: {os.strerror(ctypes.get_errno())}")
