"""E10 and E11: memory and events that several processes share."""

from __future__ import annotations

import os
import select
import statistics
from time import perf_counter, sleep

from lib.cuda import Gpu, NotRun
from lib.harness import GIB, MIB, seconds
from parts.gpu.part import GRANULE, Part
from warmserve_rt.testing.cuda_api import PAGE, READ

from . import experiment, ipc
from .channel import MOST_DESCRIPTORS, Channel, child
from .tools import speed

_DEATH = 20.0  # seconds that a killed process may take to end
_BESIDE = 0.9  # share of the speed alone that is left beside a kernel


def _others(cuda: Gpu) -> None:
    if cuda.simulated:
        raise NotRun("a simulated device belongs to one process")


@experiment("E10")
def sharing(part: Part) -> None:
    """Decide whether granules may be shared with other processes, and used again after a death.

    Expected: 60 to 150 us to import and map a granule of 16 MiB; no write by a killed process once
    its pidfd is readable, because the driver tears its channels down first; an importer keeps the
    content after the exporter has died.
    """
    cuda = Gpu()
    nbytes, count = part.scale(16 * MIB, GRANULE), part.scale(256, 8)
    handles = [ipc.create(cuda, nbytes) for _ in range(count)]
    descriptors: list[int] = []
    with part.question("exporting"):
        taken = seconds(lambda: descriptors.extend(map(cuda.export, handles)))
        part.row("export_us", taken / count * 1e6, "us")
    with part.question("importing in the same process"):
        copies = [os.dup(descriptor) for descriptor in descriptors]
        own: list[int] = []
        taken = seconds(lambda: own.extend(ipc.imported(cuda, each) for each in copies))
        part.row("import_own_us", taken / count * 1e6, "us")
        for handle in own:
            cuda.release(handle)
    with part.question("a killed importer"):
        _others(cuda)
        _killed_importer(part, cuda, handles[0], descriptors, nbytes)
    with part.question("a killed exporter"):
        _others(cuda)
        _killed_exporter(part, cuda)


def _kill(channel: Channel) -> float:
    """Kill the child; return the seconds until its pidfd is readable."""
    assert channel.process
    descriptor = os.pidfd_open(channel.process.pid)
    try:
        begin = perf_counter()
        channel.process.kill()
        if not select.select([descriptor], [], [], _DEATH)[0]:
            raise NotRun(f"a killed process had not ended after {_DEATH:g} s")
        return perf_counter() - begin
    finally:
        os.close(descriptor)


def _killed_importer(
    part: Part, cuda: Gpu, handle: int, descriptors: list[int], nbytes: int
) -> None:
    """Kill a process whose kernel writes to a granule of ours, and watch the granule."""
    address, host = ipc.mapped(cuda, handle, nbytes, READ), cuda.pinned(PAGE)

    def content() -> bytes:
        cuda.dtoh(host.address, address, 8)
        return host[:8]

    def changes(within: float) -> bool:
        before = content()
        sleep(within)
        return content() != before

    with child("importer") as channel:
        for begin in range(0, len(descriptors), MOST_DESCRIPTORS):
            batch = descriptors[begin : begin + MOST_DESCRIPTORS]
            channel.send([len(descriptors), nbytes], batch)
        found = channel.receive()[0]
        if isinstance(found, str):
            raise NotRun(f"the other process: {found}")
        part.row("import_us", found[0], "us")
        part.row("map_imported_us", found[1], "us")
        part.decide(f"to import and map a granule of another process takes {sum(found):.0f} us")
        channel.send()
        channel.expect("runs")
        if not changes(0.05):
            raise NotRun("the kernel of the other process wrote nothing")
        part.row("pidfd_readable_ms", 1e3 * _kill(channel), "ms")
        begun, last, seen = perf_counter(), 0.0, content()
        while perf_counter() < begun + 1:
            if (now := content()) != seen:
                seen, last = now, perf_counter() - begun
        part.row("last_write_after_pidfd_ms", 1e3 * last, "ms")
        part.decide(
            f"a killed process wrote for {1e3 * last:.1f} ms after its pidfd was readable: its "
            "granules must be kept apart for longer"
            if last
            else "a killed process writes nothing once its pidfd is readable: its granules may be "
            "used again"
        )


def _killed_exporter(part: Part, cuda: Gpu) -> None:
    with child("exporter") as channel:
        message, descriptors = channel.receive()
        if message != "made":
            raise NotRun(f"the other process: {message}")
        address = ipc.mapped(cuda, ipc.imported(cuda, descriptors[0]), GRANULE, READ)
        _kill(channel)
    host = cuda.pinned(PAGE)
    cuda.dtoh(host.address, address, 4)
    kept = host[:4] == b"kept"
    part.row("content_survives_exporter", int(kept), "")
    part.decide(
        "an importer keeps the content of a granule whose exporter has died"
        if kept
        else "a granule dies with its exporter"
    )


@experiment("E11")
def filler(part: Part) -> None:
    """Decide whether a process of its own may do the copies for processes that compute.

    Expected: at least 50 GB/s beside a kernel of another process that fills the device, because
    copy engines are scheduled apart from kernels (half, if processes take turns on the device); a
    wait for an event of another process holds.
    """
    cuda = Gpu()
    region, total = part.scale(256 * MIB, 8 * MIB), part.scale(2 * GIB, 8 * MIB)
    host, address = cuda.pinned(region, b"x" * region), cuda.mapped(region)
    sizes, piece = (region, total), min(16 * MIB, region)
    alone = speed(cuda, address, host.address, sizes, piece)
    part.row("copies_alone_gb_per_s", alone, "GB/s")
    _others(cuda)
    with child("busy") as channel:
        channel.send(part.scale(3.0, 1.0))
        channel.expect("runs")
        sleep(0.1)
        rates = []
        while not select.select([channel], [], [], 0)[0]:
            rates.append(speed(cuda, address, host.address, sizes, piece))
        channel.expect("done")
        if len(rates) < 2:
            raise NotRun("the other process's kernel ended during the first copies")
        beside = statistics.median(rates[:-1])  # the kernel ended during the last
        part.row("copies_beside_kernel_gb_per_s", beside, "GB/s")
        part.decide(
            "copies run beside another process's kernel: a process of its own may do them"
            if beside >= _BESIDE * alone
            else f"copies keep {beside / alone:.2f} of their speed beside another process's "
            "kernel: each engine must do its own"
        )
        with part.question("an event of another process"):
            _event(part, cuda, channel, address, host.address, region)


def _event(part: Part, cuda: Gpu, channel: Channel, address: int, host: int, region: int) -> None:
    """Let the other process wait for an event behind copies, and read what the last one wrote."""
    handle, event, stream = ipc.create(cuda, GRANULE), cuda.event(ipc.EVENT), cuda.stream()
    shared = ipc.mapped(cuda, handle, GRANULE)
    cuda.htod(shared, cuda.pinned(PAGE, b"old.").address, 4)
    new = cuda.pinned(PAGE, b"new.")
    channel.send(ipc.export_event(cuda, event), [cuda.export(handle)])
    channel.expect("ready")
    for _ in range(part.scale(32, 64)):  # 8 GiB: 150 ms
        cuda.htod(address, host, region, stream)
    cuda.htod(shared, new.address, 4, stream)
    cuda.record(event, stream)
    channel.send()
    (pending, content), _ = channel.receive()
    if not pending:
        raise NotRun("the copies ended before the other process waited for them")
    part.row("event_holds", int(content == "new."), "")
    part.decide(
        "a wait for an event of another process holds"
        if content == "new."
        else f"a wait for an event of another process does not hold: it read {content!r}"
    )
