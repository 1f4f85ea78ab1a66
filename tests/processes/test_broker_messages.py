"""Risk: a client that sends bad bytes ends the broker, or changes anything for others."""

from __future__ import annotations

import math
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from wire import HEADER, HELLO, MOST_INLINE, OPS, PROTOCOL, Wire, error, packet

from processes import Process, Processes, expected, wait_until

MODEL = 1  # the number of the only model
HUGE = 2**64 - 1


def in_file(nbytes: int, op: str = "status") -> bytes:
    return HEADER.pack(OPS.index(op), 1, 1, nbytes)


def list_of(count: int) -> bytes:
    """Return a request for layers whose list claims `count` elements."""
    data = struct.pack("<QQ", MODEL, count)
    return HEADER.pack(OPS.index("want"), 0, 1, len(data)) + data


# The broker ends the connection.
BAD = {
    "garbage": b"\xff" * 100,
    "one byte": b"\x00",
    "half a header": HELLO[: HEADER.size // 2],
    "a header without its body": HELLO[: HEADER.size],
    "a body that ends early": packet("want", MODEL),
    "a body with more than a message": packet("cancel", 1, 2, 3),
    "a body of other bytes than the header says": HEADER.pack(OPS.index("status"), 0, 1, 8),
    "a packet of more bytes than a message may have": HEADER.pack(
        OPS.index("status"), 0, 1, 2 * MOST_INLINE
    )
    + bytes(2 * MOST_INLINE),
    "an unknown op": packet(999),
    "a message that only brokers send": packet("map", MODEL, 0),
    "a body in a file, without a file": in_file(8),
    "a list of 2**64 - 1 elements": list_of(HUGE),
    "a list of 2**61 elements": list_of(2**61),
    "a text of 2**64 - 1 bytes": HEADER.pack(OPS.index("hello"), 0, 1, 16)
    + struct.pack("<QQ", 1, HUGE),
    "an unknown model": packet("want", 77, [0], 1, 0, HUGE, math.inf, 0),
    "model 0": packet("unmapped", 0, [0]),
    "a layer out of range": packet("want", MODEL, [3], 1, 0, HUGE, math.inf, 0),
    "a layer of 32 bits": packet("held", MODEL, [2**32 - 1]),
    "an unknown way to wait": packet("evict", MODEL, [0], 99, HUGE),
    "keep values of another number of layers": packet("keep", MODEL, 1, 1.0),
    "a keep value that is no number": packet("keep", MODEL, 3, 1.0, math.nan, 1.0),
}


@pytest.fixture
def broker(machine: Processes) -> Process:
    return machine.broker(8)


@pytest.fixture
def client(machine: Processes, broker: Process, files: dict[str, Path]) -> Process:
    """Return a client that has a model mapped."""
    made = machine.client(a=files["a"])
    assert made.run("weights('a')") == expected("a")
    return made


def test_bad_messages_end_their_connection_only(
    machine: Processes, broker: Process, client: Process
) -> None:
    for name, data in BAD.items():
        with Wire(machine.path) as wire:
            wire.send(data)
            assert wire.refused(), name
    client.run("runtime.evict('a')")
    assert client.run("weights('a')") == expected("a")
    wait_until(lambda: len(machine.state().clients) == 2)  # with the one that asks
    broker.run("runtime.check_invariants()")


@pytest.mark.parametrize("op", [op for op in OPS if op != "hello"])
def test_the_first_message_must_be_hello(machine: Processes, broker: Process, op: str) -> None:
    with Wire(machine.path, hello=False) as wire:
        wire.send(packet(op))
        assert "hello" in wire.refused()


def memory_file(nbytes: int) -> int:
    made = os.memfd_create("body")
    os.ftruncate(made, nbytes)
    return made


FILES: dict[str, tuple[int, Callable[[], int]]] = {
    "a pipe": (8, lambda: os.pipe()[0]),
    "a folder": (8, lambda: os.open("/", os.O_RDONLY)),
    "a file that never ends": (8, lambda: os.open("/dev/zero", os.O_RDONLY)),
    "a file with fewer bytes": (2 * MOST_INLINE, lambda: memory_file(MOST_INLINE)),
    "more bytes than a message may have": (1 << 40, lambda: memory_file(1 << 40)),
    "more bytes than there are": (HUGE, lambda: memory_file(4096)),
}


@pytest.mark.parametrize("name", FILES)
def test_a_body_in_a_file_that_is_none_ends_the_connection(
    machine: Processes, broker: Process, name: str
) -> None:
    nbytes, make = FILES[name]
    file = make()
    with Wire(machine.path) as wire:
        wire.send(in_file(nbytes), [file])
        os.close(file)
        assert wire.refused()
    machine.state()


def test_a_model_without_its_descriptors_is_refused_in_words(
    machine: Processes, broker: Process, files: dict[str, Path]
) -> None:
    place = [str(files["a"]), 0, 0, 0, 0, 0]
    with Wire(machine.path) as wire:
        op, data = wire.ask(packet("enroll", "x", 1, *place, 0))
        assert op == "error"
        assert "1 files came with 0 descriptors" in error(data)
        pipe = os.pipe()
        wire.send(packet("files"), [pipe[0]])
        op, data = wire.ask(packet("enroll", "x", 1, *place, 0))
        assert op == "error"
        assert "not a regular file" in error(data)
        for each in pipe:
            os.close(each)


def test_another_version_of_the_protocol_is_refused_with_both_versions(
    machine: Processes, broker: Process
) -> None:
    ours = broker.run("warmserve_rt.__version__")
    with Wire(machine.path, hello=False) as wire:
        wire.send(packet("hello", 7, "9.8", "name"))
        said = wire.refused()
    assert "warmserve-rt 9.8 speaks protocol 7" in said
    assert f"warmserve-rt {ours}" in said
    assert f"protocol {PROTOCOL}:" in said


def test_a_flood_of_small_messages_leaves_the_broker_to_others(
    machine: Processes, broker: Process, client: Process
) -> None:
    wire = Wire(machine.path)
    flood = machine.process(
        "from wire import *\nwire = Wire(path)\nmessage = packet('cancel', 1, 0)",
    )
    flood.begin("for _ in range(100_000): wire.socket.send(message)")
    while not flood.answered():
        client.run("runtime.evict('a')")
        assert client.run("weights('a')") == expected("a")
        time.sleep(0.02)
    flood.result()
    wire.close()
    broker.run("runtime.check_invariants()")


def test_a_client_that_reads_no_answers_does_not_fill_the_brokers_memory(
    machine: Processes, broker: Process, client: Process
) -> None:
    """The broker stops reading what such a client sends."""
    with Wire(machine.path) as wire:
        wire.socket.setblocking(False)
        message, sent = packet("status"), 0
        end = time.monotonic() + 2
        while sent < 20_000 and time.monotonic() < end:
            try:
                wire.send(message)
                sent += 1
            except BlockingIOError:
                time.sleep(0.01)
        assert sent < 20_000
        assert client.run("weights('a')") == expected("a")
    assert broker.run("int(open('/proc/self/statm').read().split()[1]) << 12") < 300 << 20


def test_finished_evictions_leave_no_threads_behind(
    machine: Processes, broker: Process, client: Process
) -> None:
    maps = "sum(1 for line in open('/proc/self/maps'))"
    client.run("for _ in range(20): runtime.evict('a')")
    before = broker.run(maps)
    client.run("for _ in range(200): runtime.evict('a')")
    assert broker.run(maps) < before + 20


def test_evictions_that_wait_are_limited(
    machine: Processes, broker: Process, client: Process
) -> None:
    client.run("lease = runtime.lease('a').acquire()")
    with Wire(machine.path) as wire:
        for request in range(1, 500):
            wire.send(packet("evict", MODEL, [0], 2, HUGE, request=request))
        op, data = wire.receive()
        assert op == "error"
        assert "evictions" in error(data)
        assert broker.run("len(os.listdir('/proc/self/task'))") < 100
    client.run("lease.release()")
    client.run("runtime.evict('a')")
