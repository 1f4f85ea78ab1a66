"""The processes beside an experiment's own: ``python -m parts.gpu.experiments.children NAME END``.

END is the descriptor of the channel.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from lib.cuda import CudaError, Gpu, NotRun, code
from lib.harness import seconds
from parts.gpu.part import GRANULE
from warmserve_rt.testing.cuda_api import PAGE, READ

from . import ipc
from .channel import Channel
from .page_cache import rate
from .ptx import SpinCall, functions

_SPIN = 60.0  # seconds; the process is killed earlier
_BLOCKS, _THREADS = 1024, 256  # about as many as an H200 runs at once


def _spin(cuda: Gpu, time: float, store: int = 0, blocks: int = 1, threads: int = 1) -> int:
    """Start a kernel; return its stream."""
    function, stream = functions(cuda)[0], cuda.stream()
    cuda.launch(function, SpinCall(int(time * 1e9), store), stream, blocks, threads)
    return stream


def reads(channel: Channel) -> None:
    """Read the page cache as E6 asks, until the end."""
    channel.send("runs")
    while True:
        way, path, threads, time = channel.receive()[0]
        channel.send(rate(way, Path(path), threads, time))


def importer(channel: Channel) -> None:
    """Import granules and map them; then let a kernel write to the first until the end."""
    cuda = Gpu()
    (count, nbytes), descriptors = channel.receive()
    while len(descriptors) < count:
        descriptors += channel.receive()[1]
    begin = perf_counter()
    handles = [ipc.imported(cuda, descriptor) for descriptor in descriptors]
    importing = perf_counter() - begin
    address = cuda.reserve(count * nbytes)

    def map_all() -> None:
        for number, handle in enumerate(handles):
            cuda.map(address + number * nbytes, nbytes, handle)
        cuda.set_access(address, count * nbytes)

    channel.send([importing / count * 1e6, seconds(map_all) / count * 1e6])
    channel.receive()
    _spin(cuda, _SPIN, address)
    channel.send("runs")
    channel.receive()


def exporter(channel: Channel) -> None:
    """Hand out a granule with content, and live until the end."""
    cuda = Gpu()
    handle = ipc.create(cuda, GRANULE)
    address = ipc.mapped(cuda, handle, GRANULE)
    cuda.htod(address, cuda.pinned(PAGE, b"kept").address, 4)
    channel.send("made", [cuda.export(handle)])
    channel.receive()


def busy(channel: Channel) -> None:
    """Fill the device with a kernel; then wait for an event of the experiment's process."""
    cuda = Gpu()
    stream = _spin(cuda, channel.receive()[0], 0, _BLOCKS, _THREADS)
    channel.send("runs")
    cuda.synchronize(stream)
    channel.send("done")
    text, descriptors = channel.receive()
    event = ipc.open_event(cuda, text)
    address = ipc.mapped(cuda, ipc.imported(cuda, descriptors[0]), GRANULE, READ)
    host = cuda.pinned(PAGE)
    channel.send("ready")
    channel.receive()
    pending = not cuda.done(event)
    cuda.wait(stream, event)
    cuda.dtoh(host.address, address, 4, stream)
    cuda.synchronize(stream)
    channel.send([pending, host[:4].decode("latin-1")])


def record_destroyed(channel: Channel) -> None:
    """Record an event on a destroyed stream, which may end the process."""
    cuda = Gpu()
    event, stream = cuda.event(), cuda.stream()
    cuda.stream_destroy(stream)
    channel.send(code(cuda.record, event, stream))


CHILDREN: dict[str, Callable[[Channel], None]] = {
    work.__name__: work for work in (reads, importer, exporter, busy, record_destroyed)
}


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[2])))
    try:
        CHILDREN[sys.argv[1]](channel)
    except (CudaError, NotRun) as error:
        channel.send(str(error))


if __name__ == "__main__":
    main()
