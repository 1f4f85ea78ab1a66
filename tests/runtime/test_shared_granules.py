"""Risk: a process sees other bytes than the process that shares a granule, or can change them."""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from warmserve_rt import WarmServeError, _native, testing

MIB = 1 << 20
GRANULE = 2 * MIB

# Receives (descriptor, offset), then answers each line of its input.
IMPORTER = """
import os, socket, sys
from warmserve_rt import _native, testing
link = socket.socket(fileno=int(sys.argv[1]))
message, descriptors, _, _ = socket.recv_fds(link, 64, 4)
shared = (descriptors[0], int(message))
watched = testing.watch()
granule = _native.MappedGranule(watched.driver, 2 << 20, shared=shared, writable=False)
os.close(descriptors[0])
print("imported", flush=True)
for line in sys.stdin:
    print(granule.read(int(line)).hex(), flush=True)
del granule
watched.check()
"""


@contextlib.contextmanager
def importer(shared: tuple[int, int]) -> Iterator[subprocess.Popen[str]]:
    """Start a process that has imported the granule."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", IMPORTER, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            cwd="/",  # it would import the package from the sources, which are not built
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdin
            assert process.stdout
            rights = array.array("i", [shared[0]])
            text = str(shared[1]).encode()
            ours.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            assert process.stdout.readline() == "imported\n"
            yield process
            process.stdin.close()
            assert process.wait(60) == 0


def read(process: subprocess.Popen[str], nbytes: int) -> bytes:
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{nbytes}\n")
    process.stdin.flush()
    return bytes.fromhex(process.stdout.readline())


def test_another_process_reads_what_this_one_writes() -> None:
    driver = _native.host_driver()
    before = _native.MappedGranule(driver, GRANULE)  # so that the offset is not 0
    granule = _native.MappedGranule(driver, GRANULE)
    before.write(b"before")
    granule.write(b"first")
    shared = granule.share()
    assert shared[1] == GRANULE
    with importer(shared) as process:
        os.close(shared[0])
        assert read(process, 5) == b"first"
        granule.write(b"later")
        assert read(process, 5) == b"later"
    assert granule.read(5) == b"later"  # the other process has released its granule


def test_the_descriptor_cannot_write() -> None:
    granule = _native.MappedGranule(_native.host_driver(), GRANULE)
    descriptor, _ = granule.share()
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(descriptor, GRANULE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        assert os.fstat(descriptor).st_mode & 0o777 == 0o600
        with pytest.raises(WarmServeError, match="can only be read"):
            _native.MappedGranule(_native.host_driver(), GRANULE, shared=(descriptor, 0))
    finally:
        os.close(descriptor)


def test_a_granule_is_shared_several_times() -> None:
    driver = _native.host_driver()
    granule = _native.MappedGranule(driver, GRANULE)
    granule.write(b"bytes")
    shared = [granule.share() for _ in range(3)]
    watched = testing.watch()
    imported = [
        _native.MappedGranule(watched.driver, GRANULE, shared=one, writable=False) for one in shared
    ]
    for descriptor, _ in shared:
        os.close(descriptor)
    assert [one.read(5) for one in imported] == [b"bytes"] * 3
    imported.clear()
    watched.check()
    assert granule.read(5) == b"bytes"


def test_importers_hold_one_descriptor_per_file() -> None:
    granules = [_native.MappedGranule(_native.host_driver(), GRANULE) for _ in range(2)]
    shared = [granule.share() for granule in granules for _ in range(4)]
    driver = _native.host_driver()
    before = len(os.listdir("/proc/self/fd"))
    imported = [
        _native.MappedGranule(driver, GRANULE, shared=one, writable=False) for one in shared
    ]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    imported.clear()
    assert len(os.listdir("/proc/self/fd")) == before
    for descriptor, _ in shared:
        os.close(descriptor)


def refusal(descriptor: int, offset: int = 0) -> str:
    with pytest.raises(WarmServeError) as raised:
        _native.MappedGranule(
            _native.host_driver(), GRANULE, shared=(descriptor, offset), writable=False
        )
    return str(raised.value)


def test_descriptors_that_are_not_of_a_granule_are_refused() -> None:
    granule = _native.MappedGranule(_native.host_driver(), GRANULE)
    descriptor, _ = granule.share()
    assert "has no granule of 2 MiB at offset 2097152" in refusal(descriptor, GRANULE)
    assert "at offset 4096" in refusal(descriptor, 4096)
    os.close(descriptor)
    assert "Bad file descriptor" in refusal(-1)
    ends = os.pipe()
    assert "must be of a regular file, opened read-only" in refusal(ends[0])
    writable = os.memfd_create("writable")
    os.truncate(writable, GRANULE)
    assert "must be of a regular file, opened read-only" in refusal(writable)
    for other in (*ends, writable):
        os.close(other)


def test_misuse_is_a_violation() -> None:
    owner = _native.MappedGranule(_native.host_driver(), GRANULE)
    shared = owner.share()
    watched = testing.watch()
    imported = _native.MappedGranule(watched.driver, GRANULE, shared=shared, writable=False)
    with pytest.raises(WarmServeError):
        imported.share()
    with pytest.raises(WarmServeError):
        imported.write(b"bytes")
    with pytest.raises(WarmServeError):
        _native.MappedGranule(watched.driver, GRANULE, shared=shared, writable=True)
    with pytest.raises(WarmServeError):
        _native.MappedGranule(watched.driver, MIB, shared=shared, writable=False)
    os.close(shared[0])
    assert watched.strict.violations == [
        "granule_export of an imported granule",
        "copy_to_device without access",
        "set_access of an imported granule to read_write",
        "address_reserve of 1048576 bytes",
    ]
