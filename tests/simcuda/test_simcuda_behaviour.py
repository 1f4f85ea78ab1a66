"""Risk: a program passes on the simulated driver because it is kinder than a GPU: the driver reads
a source early, waits when CUDA does not, lets the CPU access device memory, or forgets an error."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator

import pytest

from warmserve_rt.testing import simulated_cuda
from warmserve_rt.testing.cuda_api import (
    BLOCKING,
    HOST_NUMA,
    LEGACY,
    NONE,
    PAGE,
    READ,
    READ_WRITE,
    Cuda,
    Pinned,
    code,
)
from warmserve_rt.testing.cuda_types import Prop
from warmserve_rt.testing.simcuda import SimulatedCuda

G = 2 << 20
SLOW = G / 0.05  # bytes per second: a granule takes 50 ms


@pytest.fixture(params=["real", "virtual"])
def simulated(request: pytest.FixtureRequest) -> Iterator[SimulatedCuda]:
    """Yield a driver whose copies to the device are still in progress at the next call."""
    with simulated_cuda(memory="64MiB", clock=request.param, h2d=SLOW, check=False) as made:
        yield made


@pytest.fixture
def cuda(simulated: SimulatedCuda) -> Cuda:
    return Cuda(simulated.library).start()


def kinds(simulated: SimulatedCuda) -> list[str]:
    return [each.kind for each in simulated.violations]


def busy(cuda: Cuda, stream: int) -> None:
    """Keep the stream busy, so that the next work on it waits for a while."""
    cuda.htod(cuda.mapped(G), cuda.pinned(G).address, G, stream)


def dies(simulated: SimulatedCuda, body: str) -> bool:
    """Return whether the last line of a program, and no earlier line, gets SIGSEGV.

    The program may use ``cuda`` and ``G``.
    """
    lines = textwrap.dedent(body).strip().splitlines()
    script = f"""
import ctypes, sys
from warmserve_rt.testing.cuda_types import Prop
from warmserve_rt.testing.cuda_api import Cuda, HOST_NUMA, NONE, READ, READ_WRITE
cuda, G = Cuda("libcuda.so.1").start(), {G}
"""
    script += "\n".join([*lines[:-1], "print('so far', flush=True)", lines[-1]])
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd="/",  # so that it imports the installed package
        env=simulated.environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "so far\n", done.stderr
    assert done.returncode in (0, -11), done.stderr
    return done.returncode != 0


def test_the_cpu_cannot_reach_device_memory() -> None:
    with simulated_cuda() as simulated:
        assert dies(simulated, "address = cuda.mapped(G)\nctypes.string_at(address, 1)")


READS, WRITES = "ctypes.string_at(address + G, 1)", "ctypes.memset(address + G, 1, 1)"


@pytest.mark.parametrize(
    ("calls", "access", "dead"),
    [
        ("", READS, True),
        ("cuda.set_access(address, 2 * G)", READS, True),
        ("cuda.share(address, 2 * G, READ)", READS, False),
        ("cuda.share(address, 2 * G, READ)", WRITES, True),
        ("cuda.share(address, 2 * G, READ_WRITE)", WRITES, False),
        ("cuda.share(address, 2 * G, READ_WRITE); cuda.share(address, 2 * G, READ)", WRITES, True),
        ("cuda.share(address, 2 * G, READ_WRITE); cuda.share(address, 2 * G, NONE)", READS, True),
        ("cuda.share(address, 2 * G, READ_WRITE); cuda.unmap(address, 2 * G)", READS, True),
    ],
)
def test_access_of_the_cpu_to_host_memory_is_enforced(calls: str, access: str, dead: bool) -> None:
    with simulated_cuda(integrated=True) as simulated:
        body = f"""
            address = cuda.reserve(2 * G)
            cuda.map(address, 2 * G, cuda.create(2 * G, Prop(location=HOST_NUMA)))
            {calls}
            {access}
        """
        assert dies(simulated, body) is dead


@pytest.mark.parametrize("option", ["integrated", "host_numa"])
def test_the_cpu_and_the_device_see_the_same_bytes(option: str) -> None:
    with simulated_cuda(memory="64MiB", leaks=True, **{option: True}) as simulated:  # type: ignore[arg-type]
        cuda = Cuda(simulated.library).start()
        assert (cuda.attribute(18), cuda.attribute(134), cuda.attribute(141)) == (
            option == "integrated",
            0,
            1,
        )
        prop = Prop(location=HOST_NUMA)
        assert cuda.granularity(prop=prop) == G
        free, _ = cuda.memory()
        fence, stream, host = cuda.create(G), cuda.stream(), cuda.pinned(2 * G)
        handles = [cuda.create(G, prop), cuda.create(G, prop)]
        # Granules in host memory count only if the device has no memory of its own.
        held = 3 * G if option == "integrated" else G
        assert cuda.memory()[0] == free - held
        view, address = cuda.reserve(2 * G), cuda.reserve(2 * G)
        for i, handle in enumerate(handles):
            cuda.map(view + i * G, G, handle)
            cuda.map(address + (1 - i) * G, G, handle)  # in reverse order
            cuda.release(handle)
        cuda.share(view, 2 * G, READ_WRITE)
        cuda.set_access(address, 2 * G)
        assert cuda.get_access(view, 0, HOST_NUMA) == cuda.get_access(view) == READ_WRITE
        assert (cuda.get_access(address, 0, HOST_NUMA), cuda.get_access(address)) == (0, READ_WRITE)

        ctypes.memmove(view + G - 3, b"across", 6)
        cuda.dtoh(host.address, view + G - 3, 6, stream)
        cuda.dtoh(host.address + 6, address + 2 * G - 3, 3, stream)
        cuda.dtoh(host.address + 9, address + 100, 4, stream)  # these bytes were never written
        cuda.synchronize(stream)
        assert host[:9] == b"acrossacr"
        cuda.htod(address + 7, host.address, 6, stream)
        cuda.synchronize(stream)
        assert ctypes.string_at(view + G + 7, 6) == b"across"

        cuda.share(view, 2 * G, READ)
        assert cuda.get_access(view, 0, HOST_NUMA) == READ
        assert ctypes.string_at(view + G + 7, 6) == b"across"
        cuda.unmap(view, 2 * G)
        cuda.map(view, G, fence)  # device memory: the CPU has no access
        assert code(cuda.share, view, G, READ) == 1
        assert cuda.get_access(view) == 0  # a failed call changes nothing
        assert cuda.get_access(view, 0, HOST_NUMA) == 0
        assert code(cuda.create, G, Prop(location=HOST_NUMA, id=1)) == 1
        assert code(cuda.get_access, view, 1, HOST_NUMA) == 1
        cuda.unmap(view, G)
        cuda.unmap(address, 2 * G)
        cuda.release(fence)
        for at in (view, address):
            cuda.address_free(at, 2 * G)
        assert cuda.memory()[0] == free
        cuda.unregister(host.address)
        cuda.stream_destroy(stream)
        cuda.release_primary()


def test_the_device_can_race_with_itself_in_host_memory() -> None:
    # With the real clock, the work may also run after the unmap, which adds another violation.
    with simulated_cuda(integrated=True, clock="virtual", check=False) as simulated:
        cuda = Cuda(simulated.library).start()
        address = cuda.reserve(G)
        cuda.map(address, G, cuda.create(G, Prop(location=HOST_NUMA)))
        cuda.share(address, G, READ_WRITE)
        cuda.memset(address, 1, 10, cuda.stream())
        cuda.memset(address, 1, 10, cuda.stream())
        cuda.unmap(address, G)
        assert kinds(simulated) == ["race", "use-while-unmapped"]


def test_a_device_without_host_memory_refuses_it(cuda: Cuda) -> None:
    assert (cuda.attribute(18), cuda.attribute(141)) == (0, 0)
    assert code(cuda.create, G, Prop(location=HOST_NUMA)) == 801
    address = cuda.mapped(G)
    assert code(cuda.share, address, G, READ) == 1
    assert code(cuda.get_access, address, 0, HOST_NUMA) == 1


@pytest.mark.parametrize("registered", [True, False])
def test_pinned_sources_are_read_late_and_pageable_ones_early(
    simulated: SimulatedCuda, cuda: Cuda, registered: bool
) -> None:
    """Pinned memory is read when the copy runs, pageable memory before the call returns."""
    stream, address = cuda.stream(), cuda.mapped(G)
    source = cuda.pinned(PAGE, b"early") if registered else Pinned(PAGE)
    source[:5] = b"early"
    busy(cuda, stream)
    cuda.htod(address, source.address, 5, stream)
    source[:5] = b"late!"
    cuda.synchronize(stream)
    assert simulated.peek(address, 5) == (b"late!" if registered else b"early")


def test_a_copy_to_the_host_arrives_when_it_runs(cuda: Cuda) -> None:
    stream, address, host = cuda.stream(), cuda.mapped(G), cuda.pinned(PAGE, b"-----")
    cuda.memset(address, ord("x"), 5, stream)
    busy(cuda, stream)
    cuda.dtoh(host.address, address, 5, stream)
    assert host[:5] == b"-----"
    cuda.synchronize(stream)
    assert host[:5] == b"xxxxx"


def test_unmap_does_not_wait_and_pending_work_dies(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, other = cuda.stream(), cuda.stream()
    address, host = cuda.mapped(G), cuda.pinned(PAGE)
    event = cuda.event()
    busy(cuda, stream)
    cuda.htod(address, host.address, 10, stream)
    cuda.record(event, stream)
    cuda.unmap(address, G)
    assert not cuda.done(event)
    assert "use-while-unmapped" in kinds(simulated)
    assert code(cuda.synchronize, stream) == 719
    survivor = code(cuda.memset, cuda.reserve(G), 0, 1, other)
    assert survivor == 719  # sticky: all later work returns it
    assert code(cuda.context_synchronize) == 719


def test_unregistering_waits_for_all_work(simulated: SimulatedCuda, cuda: Cuda) -> None:
    """Unregistering waits even for work that does not touch the memory."""
    stream, event, host = cuda.stream(), cuda.event(), cuda.pinned(PAGE)
    busy(cuda, stream)
    cuda.record(event, stream)
    assert not cuda.done(event)
    cuda.unregister(host.address)
    assert cuda.done(event)
    assert not simulated.violations


def test_addresses_are_looked_up_when_the_copy_runs(simulated: SimulatedCuda, cuda: Cuda) -> None:
    """If another granule is mapped too early at the same addresses, it receives the bytes."""
    stream, address, host = cuda.stream(), cuda.reserve(G), cuda.pinned(PAGE, b"bytes")
    first, second = cuda.create(G), cuda.create(G)
    cuda.map(address, G, first)
    cuda.set_access(address, G)
    busy(cuda, stream)
    cuda.htod(address, host.address, 5, stream)
    cuda.unmap(address, G)
    cuda.map(address, G, second)
    cuda.set_access(address, G)
    assert code(cuda.synchronize, stream) == 0
    assert simulated.peek(address, 5) == b"bytes"
    assert kinds(simulated) == ["use-while-unmapped"]


def test_memory_can_be_unmapped_after_a_wait(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, address, host = cuda.stream(), cuda.mapped(G), cuda.pinned(PAGE)
    event = cuda.event()
    cuda.htod(address, host.address, 10, stream)
    cuda.record(event, stream)
    while not cuda.done(event):
        pass
    cuda.unmap(address, G)
    cuda.address_free(address, G)
    cuda.unregister(host.address)
    assert not simulated.violations


def test_a_wait_of_a_stream_is_not_a_wait_of_the_host(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, other, address, event = cuda.stream(), cuda.stream(), cuda.mapped(G), cuda.event()
    cuda.memset(address, 1, G, stream)
    cuda.record(event, stream)
    cuda.wait(other, event)
    cuda.unmap(address, G)
    assert "use-while-unmapped" in kinds(simulated)


@pytest.mark.parametrize(("registered", "found"), [(True, []), (False, ["race"])])
def test_a_staged_copy_may_still_run_after_its_call(
    simulated: SimulatedCuda, cuda: Cuda, registered: bool, found: list[str]
) -> None:
    """When a synchronous copy from pageable memory returns, only its source may be reused."""
    stream, first, second = cuda.stream(), cuda.mapped(G), cuda.mapped(G)
    source = cuda.pinned(PAGE) if registered else Pinned(PAGE)
    cuda.htod(first, source.address, 10)
    cuda.memset(first, 1, 10, stream)
    assert kinds(simulated) == found
    cuda.htod(second, source.address, 10)
    cuda.unmap(second, G)
    assert kinds(simulated) == found + ["use-while-unmapped"] * (not registered)


def test_operations_that_race_run_one_after_the_other(simulated: SimulatedCuda, cuda: Cuda) -> None:
    """The race is reported, and the simulator's own threads do not race (ThreadSanitizer looks)."""
    first, second, address = cuda.stream(), cuda.stream(), cuda.mapped(8 * G)
    for _ in range(10):
        cuda.memset(address, 1, 8 * G, first)
        cuda.memset(address, 2, 8 * G, second)
        cuda.context_synchronize()
        assert simulated.peek(address, 8 * G) in (bytes([1]) * 8 * G, bytes([2]) * 8 * G)
    assert kinds(simulated) == ["race"] * 10


def test_a_staged_copy_waits_for_earlier_work(simulated: SimulatedCuda, cuda: Cuda) -> None:
    blocking, stream, address = cuda.stream(BLOCKING), cuda.stream(), cuda.mapped(G)
    source = Pinned(PAGE)
    cuda.memset(address, 1, 10, blocking)
    cuda.htod(cuda.mapped(G), source.address, 10)
    cuda.memset(address, 2, 10, stream)
    cuda.context_synchronize()
    assert not simulated.violations


def test_unregistering_host_memory_in_use_is_a_violation(
    simulated: SimulatedCuda, cuda: Cuda
) -> None:
    stream, host = cuda.stream(), cuda.pinned(PAGE)
    busy(cuda, stream)
    cuda.htod(cuda.mapped(G), host.address, 10, stream)
    cuda.unregister(host.address)
    assert "use-while-unmapped" in kinds(simulated)


@pytest.mark.parametrize("access", [READ, NONE])
def test_access_is_enforced(simulated: SimulatedCuda, cuda: Cuda, access: int) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE, b"new"), cuda.mapped(G)
    cuda.memset(address, ord("o"), 3, stream)
    cuda.synchronize(stream)
    cuda.set_access(address, G, access)
    assert cuda.get_access(address) == access
    assert code(cuda.htod, address, host.address, 3, stream) or code(cuda.synchronize, stream)
    assert simulated.peek(address, 3) == b"ooo"


def test_access_that_changes_under_a_copy_kills_it(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE, b"new"), cuda.mapped(G)
    cuda.memset(address, ord("o"), 3, stream)
    cuda.synchronize(stream)
    busy(cuda, stream)
    cuda.htod(address, host.address, 3, stream)
    cuda.set_access(address, G, READ)
    assert code(cuda.synchronize, stream) == 719
    assert simulated.peek(address, 3) == b"ooo"
    assert "use-while-unmapped" in kinds(simulated)


def test_read_only_memory_is_readable(cuda: Cuda) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE), cuda.mapped(G)
    cuda.memset(address, ord("o"), 3, stream)
    cuda.synchronize(stream)
    cuda.set_access(address, G, READ)
    cuda.dtoh(host.address, address, 3, stream)
    cuda.synchronize(stream)
    assert host[:3] == b"ooo"


def test_memory_outlives_its_release(simulated: SimulatedCuda, cuda: Cuda) -> None:
    free, _ = cuda.memory()
    handle, address, alias = cuda.create(G), cuda.reserve(G), cuda.reserve(G)
    for at in (address, alias):
        cuda.map(at, G, handle)
        cuda.set_access(at, G)
    cuda.release(handle)
    cuda.htod(address, cuda.pinned(PAGE, b"kept").address, 4)
    assert simulated.peek(alias, 4) == b"kept"
    again = cuda.retain_handle(address + 5)
    cuda.unmap(address, G)
    cuda.unmap(alias, G)
    assert cuda.memory()[0] == free - G
    cuda.release(again)
    assert cuda.memory()[0] == free


def test_pointer_attributes_describe_reservation_and_mapping(cuda: Cuda) -> None:
    address, handle = cuda.reserve(3 * G), cuda.create(G)
    assert code(cuda.pointer_attribute, 13, address) == 1  # MAPPED
    cuda.map(address + G, G, handle)
    inside = address + G + 100
    assert cuda.pointer_attribute(13, inside) & 0xFF == 1
    assert cuda.pointer_attribute(11, inside) == address  # the range is the reservation
    assert cuda.pointer_attribute(12, inside) == 3 * G
    begin, nbytes = ctypes.c_ulonglong(), ctypes.c_size_t()
    cuda.call("cuMemGetAddressRange_v2", ctypes.byref(begin), ctypes.byref(nbytes), inside)
    assert (begin.value, nbytes.value) == (address + G, G)  # this range is the mapping


def test_a_pointer_unknown_to_the_driver_has_no_attributes(cuda: Cuda) -> None:
    names = (ctypes.c_int * 2)(2, 9)  # MEMORY_TYPE, DEVICE_ORDINAL
    values = [ctypes.c_int(7), ctypes.c_int(7)]
    data = (ctypes.c_void_p * 2)(*map(ctypes.addressof, values))
    cuda.call("cuPointerGetAttributes", 2, names, data, Pinned(PAGE).address)
    assert values[0].value == 0
    assert values[1].value in (0, -2)  # documented as 0, though 0 is also a device


@pytest.mark.parametrize("recorded_again", [False, True])
def test_a_wait_keeps_the_recorded_position_of_its_event(
    simulated: SimulatedCuda, cuda: Cuda, recorded_again: bool
) -> None:
    stream, waiter, event = cuda.stream(), cuda.stream(), cuda.event()
    address = cuda.mapped(G)
    cuda.memset(address, 1, 8, stream)
    cuda.record(event, stream)
    cuda.wait(waiter, event)
    if recorded_again:
        cuda.record(event, cuda.stream())
    cuda.memset(address, 2, 8, waiter)  # ordered after the first memset either way
    if recorded_again:
        late = cuda.stream()
        cuda.wait(late, event)
        cuda.memset(address, 3, 8, late)  # the event now stands for another stream
    cuda.context_synchronize()
    assert kinds(simulated) == ["race"] * recorded_again


@pytest.mark.parametrize(("flags", "races"), [(BLOCKING, 0), (1, 1)])
def test_the_legacy_stream_orders_blocking_streams(
    simulated: SimulatedCuda, cuda: Cuda, flags: int, races: int
) -> None:
    stream, address = cuda.stream(flags), cuda.mapped(G)
    cuda.memset(address, 1, 8, stream)
    cuda.memset(address, 2, 8, LEGACY)
    cuda.context_synchronize()
    assert kinds(simulated) == ["race"] * races


def test_reading_unwritten_bytes_is_a_violation(simulated: SimulatedCuda, cuda: Cuda) -> None:
    address, host = cuda.mapped(G), cuda.pinned(PAGE)
    cuda.htod(address + 100, host.address, 50)
    cuda.dtoh(host.address, address + 100, 50)
    assert not simulated.violations
    cuda.dtoh(host.address, address + 100, 51)
    assert kinds(simulated) == ["uninitialised-read"]
    assert simulated.violations[0].call == sum(simulated.calls.values())


def test_an_error_of_the_context_stays(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, address = cuda.stream(), cuda.mapped(G)
    simulated.break_context(719)
    for _ in range(2):
        assert code(cuda.memset, address, 0, 1, stream) == 719
        assert code(cuda.synchronize, stream) == 719


def test_a_dead_context_does_nothing_more(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, host, address = cuda.stream(), cuda.pinned(PAGE, b"new"), cuda.mapped(G)
    cuda.memset(address, ord("o"), 3, stream)
    cuda.synchronize(stream)
    busy(cuda, stream)
    cuda.htod(address, host.address, 3, stream)
    simulated.break_context(719)
    assert code(cuda.context_synchronize) == 719
    time.sleep(0.1)  # the copy would have finished by then
    assert simulated.peek(address, 3) == b"ooo"


def test_pending_work_of_a_dead_context_needs_no_wait(simulated: SimulatedCuda, cuda: Cuda) -> None:
    stream, address, host = cuda.stream(), cuda.mapped(G), cuda.pinned(PAGE)
    busy(cuda, stream)
    cuda.htod(address, host.address, 10, stream)
    simulated.break_context(719)
    assert code(cuda.synchronize, stream) == 719
    code(cuda.unmap, address, G)  # CUDA does not document what these return here
    code(cuda.unregister, host.address)
    assert not simulated.violations


def test_calls_fail_after_the_primary_context_is_destroyed(
    simulated: SimulatedCuda, cuda: Cuda
) -> None:
    stream, address = cuda.stream(), cuda.mapped(G)
    simulated.destroy_primary_context()
    assert code(cuda.memset, address, 0, 1, stream) == 709
