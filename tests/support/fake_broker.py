"""A broker that sends what a test tells it. csrc/wire/message.h has the format."""

from __future__ import annotations

import socket
from pathlib import Path

from wire import HEADER, OPS, Field, body


class FakeBroker:
    """A broker's end of one connection after the other.

    Parameters
    ----------
    path : path
        Of its socket, in a folder that it makes.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, exist_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(20)
        self._client: socket.socket | None = None
        self.request = 0  # of the last message

    def accept(self) -> None:
        """End the connection, and wait for the next one."""
        self.hang_up()
        self._client, _ = self._listener.accept()
        self._client.settimeout(20)

    def expect(self, op: str) -> bytes:
        """Return the body of the next message of this kind. Others before it are dropped."""
        assert self._client
        while data := self._client.recv(1 << 16):
            number, _, self.request, _ = HEADER.unpack_from(data)
            if OPS[number] == op:
                return data[HEADER.size :]
        raise AssertionError(f"the client has ended the connection before {op}")

    def answer(self, op: str, *fields: Field) -> None:
        """Answer the last message that was expected."""
        self._send(op, self.request, fields)

    def say(self, op: str, *fields: Field) -> None:
        """Send a message that answers none."""
        self._send(op, 0, fields)

    def _send(self, op: str, request: int, fields: tuple[Field, ...]) -> None:
        assert self._client
        data = body(*fields)
        self._client.send(HEADER.pack(OPS.index(op), 0, request, len(data)) + data)

    def hang_up(self) -> None:
        if self._client:
            self._client.close()
        self._client = None

    def close(self) -> None:
        self.hang_up()
        self._listener.close()
