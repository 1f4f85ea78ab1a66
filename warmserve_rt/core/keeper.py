"""The keeper of an arena: a process that holds the memory, and starts the broker again if it dies.

The keeper forks the broker. It has no threads, no runtime and no socket that clients know, so
little can end it. It holds descriptors of the arena's memory and of the contents record, which says
where in the memory the layers are. For each client it holds two more: of the client's process, and
of a record of the granules that the client may map. A broker that is started again finds the layers
where the last one has left them, and loads nothing again.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError
from warmserve_rt._log import log

_SOON_S = 10.0
_LONGEST_PAUSE_S = 5.0
_SERVING = b"serving"
_MESSAGE_BYTES = 256
_DESCRIPTORS = 2  # of a client: its process, and its record


@dataclass(frozen=True)
class Kept:
    """The memory and the descriptors that a broker gets from its keeper.

    Parameters
    ----------
    nbytes, granule_bytes : int
        Of the arena.
    memory, contents : int
        Descriptors of the arena's memory and of its contents record.
    keeper : socket
        To the keeper. It can be read when the keeper has ended.
    clients : tuple of (int, int)
        The clients of an earlier broker: two descriptors for each, of its process and of its
        record. :meth:`serving` closes them.
    """

    nbytes: int
    granule_bytes: int
    memory: int
    contents: int
    keeper: socket.socket
    clients: tuple[tuple[int, int], ...]

    def driver(self) -> _native.Driver:
        """Return a driver of the host whose granules lie in this memory."""
        return _native.host_driver(memory=self.memory, contents=self.contents)

    def serving(self) -> None:
        """Tell the keeper that the broker serves, so that it is started again if it dies.

        Closes the descriptors of clients, of which the broker has its own by then.
        """
        self.keeper.send(_SERVING)
        for client in self.clients:
            for descriptor in client:
                os.close(descriptor)

    def wait(self) -> None:
        """Wait until the keeper has ended."""
        while self.keeper.recv(_MESSAGE_BYTES):
            pass


def fork_broker(
    granules: int, granule_bytes: int, *, most_deaths: int = 8, pause: float = 0.02
) -> Kept:
    """Fork a broker, and another one whenever it dies. Return in each of them.

    The calling process becomes the keeper, and never returns: it raises SystemExit with the status
    of the last broker. SIGTERM and SIGINT end the broker and then the keeper. If the keeper is
    killed, :meth:`Kept.wait` returns in the broker.

    Parameters
    ----------
    granules : int
    granule_bytes : int
        A multiple of 2 MiB.
    most_deaths : int
        Deaths in a row, each within ten seconds of a start, that are borne.
    pause : float
        Seconds before a start that follows such a death; doubled with each of them, to five seconds
        at most. There is no pause after the first.

    Raises
    ------
    WarmServeError
        The broker has died again and again, or the keeper has too many open files for its clients.
    OSError
        The memory cannot be made.
    """
    nbytes = granules * granule_bytes
    memory = _make_memory("warmserve-arena", nbytes)
    contents = _make_memory("warmserve-contents", _native.bytes_of_contents(granules))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    clients: dict[str, tuple[int, ...]] = {}
    deaths = 0
    while True:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        began = time.monotonic()
        pid = os.fork()
        if not pid:
            ours.close()
            os.setpgid(0, 0)  # a terminal's Ctrl-C reaches the keeper only
            former = tuple((process, record) for process, record in clients.values())
            return Kept(nbytes, granule_bytes, memory, contents, theirs, former)
        theirs.close()
        with ours, _signals_end(pid) as asked:
            served = _follow(ours, clients)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if asked:
            raise SystemExit(0 if signal.SIGTERM in asked else 128 + signal.SIGINT)
        if status == 0 or not served:
            raise SystemExit(status if status >= 0 else 128 - status)
        deaths = deaths + 1 if time.monotonic() - began < _SOON_S else 1
        what = f"signal {-status}" if status < 0 else f"status {status}"
        if deaths > most_deaths:
            raise WarmServeError(f"the broker died {deaths} times in a row, at last with {what}")
        log.error("the broker, process %d, died with %s, and is started again", pid, what)
        if deaths > 1:
            time.sleep(min(pause * 2.0 ** min(deaths, 20), _LONGEST_PAUSE_S))


def _make_memory(name: str, nbytes: int) -> int:
    """Return a descriptor of memory that only this user's processes can open again."""
    made = os.memfd_create(name, os.MFD_CLOEXEC)
    os.fchmod(made, 0o600)
    os.ftruncate(made, nbytes)
    return made


def _follow(broker: socket.socket, clients: dict[str, tuple[int, ...]]) -> bool:
    """Do what a broker asks until it ends, and return whether it has served."""
    served = False
    while True:
        text, descriptors, flags, _ = socket.recv_fds(broker, _MESSAGE_BYTES, _DESCRIPTORS)
        if not text:
            return served
        what, _, name = text.decode().partition(" ")
        served |= text == _SERVING
        if what == "keep" and (flags & socket.MSG_CTRUNC or len(descriptors) != _DESCRIPTORS):
            # Another broker could not know what this client maps.
            raise WarmServeError("the keeper of the arena has too many open files (see ulimit -n)")
        for descriptor in clients.pop(name, ()):
            os.close(descriptor)
        if what == "keep":
            clients[name] = tuple(descriptors)


@contextmanager
def _signals_end(pid: int) -> Iterator[list[int]]:
    """Let SIGTERM and SIGINT end a process during the block. Yield those that have arrived."""
    arrived: list[int] = []

    def end(number: int, frame: object) -> None:
        arrived.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)

    before = [(number, signal.signal(number, end)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        yield arrived
    finally:
        for number, handler in before:
            signal.signal(number, handler)
