"""A client of a broker that sends any bytes. csrc/wire/message.h has the format."""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from pathlib import Path

# fmt: off
OPS = [
    "hello", "files", "enroll", "want", "cancel", "unmapped", "held", "evict", "keep", "bye",
    "status", "still_mapped", "welcome", "memory", "map", "revoke", "done", "error",
]
# fmt: on
PROTOCOL = 2
HEADER = struct.Struct("<IIQQ")  # op, whether the body is in a file, request, bytes of the body
MOST_INLINE = 32 * 1024

Field = int | float | str | list[int]


def body(*fields: Field) -> bytes:
    """Encode numbers, reals, texts and lists of small numbers, one after the other."""
    out = b""
    for field in fields:
        if isinstance(field, int):
            out += struct.pack("<Q", field % 2**64)
        elif isinstance(field, float):
            out += struct.pack("<d", field)
        elif isinstance(field, str):
            out += struct.pack("<Q", len(field.encode())) + field.encode()
        else:
            out += struct.pack(f"<Q{len(field)}I", len(field), *field)
    return out


def packet(op: str | int, *fields: Field, request: int = 1) -> bytes:
    """Encode a message whose body is inline."""
    data = body(*fields)
    number = op if isinstance(op, int) else OPS.index(op)
    return HEADER.pack(number, 0, request, len(data)) + data


HELLO = packet("hello", PROTOCOL, "0", "wire", 0, 0)  # no earlier connection


class Wire:
    """A connection to a broker."""

    def __init__(self, path: Path, *, hello: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(10)
        self.socket.connect(str(path))
        if hello:
            assert self.ask(HELLO)[0] == "welcome"

    def send(self, data: bytes, descriptors: Sequence[int] = ()) -> None:
        socket.send_fds(self.socket, [data], descriptors)

    def ask(self, data: bytes, descriptors: Sequence[int] = ()) -> tuple[str, bytes]:
        """Send a packet and return the next message: its op and its body."""
        self.send(data, descriptors)
        return self.receive()

    def receive(self) -> tuple[str, bytes]:
        data = self.socket.recv(1 << 16)
        assert data, "the broker has ended the connection"
        return OPS[HEADER.unpack_from(data)[0]], data[HEADER.size :]

    def refused(self) -> str:
        """Return the sentence of an error, after which the broker has ended the connection."""
        said = ""
        while data := self._recv():
            if HEADER.unpack_from(data)[0] == OPS.index("error"):
                said = error(data[HEADER.size :])
        return said

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _recv(self) -> bytes:
        try:
            return self.socket.recv(1 << 16)
        except ConnectionResetError:  # the broker had not read all
            return b""


def error(data: bytes) -> str:
    """Return the sentence of the body of an error."""
    (length,) = struct.unpack_from("<Q", data, 8)
    return data[16 : 16 + length].decode()
