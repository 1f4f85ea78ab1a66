"""Other processes of an experiment, and the channel to them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib.cuda import NotRun

_BENCH = Path(__file__).resolve().parents[3]
_MESSAGE = 1 << 16
MOST_DESCRIPTORS = 250  # of a message
_TIMEOUT = 30.0  # seconds


class Channel:
    """Messages with descriptors."""

    def __init__(self, end: socket.socket, process: subprocess.Popen[bytes] | None = None) -> None:
        self.process = process  # the child
        self._end = end
        end.settimeout(_TIMEOUT)

    def fileno(self) -> int:
        return self._end.fileno()

    def send(self, message: Any = None, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self._end, [json.dumps(message).encode()], list(descriptors))

    def receive(self) -> tuple[Any, list[int]]:
        data, descriptors, _, _ = socket.recv_fds(self._end, _MESSAGE, MOST_DESCRIPTORS)
        if not data:
            raise NotRun("the other process has ended")
        return json.loads(data), descriptors

    def expect(self, message: str) -> None:
        """Wait for a message; any other one says why the child cannot go on."""
        if (got := self.receive()[0]) != message:
            raise NotRun(f"the other process: {got}")


@contextmanager
def child(name: str, environment: Mapping[str, str] | None = None) -> Iterator[Channel]:
    """Yield the channel to a new process that runs one of the functions of children.py.

    The process is killed at the end.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join(filter(None, [str(_BENCH), os.environ.get("PYTHONPATH", "")]))
    with ours, theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "parts.gpu.experiments.children", name, str(theirs.fileno())],
            env={**os.environ, **(environment or {}), "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        try:
            yield Channel(ours, process)
        finally:
            process.kill()
            process.wait()
