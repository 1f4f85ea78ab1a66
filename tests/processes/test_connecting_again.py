"""Risk: a client takes another message for an answer, or an end of the connection for a refusal,
while it connects again."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from fake_broker import FakeBroker

from processes import Process, Processes

ARENA, TOKEN = 17, 23
GRANULES = (2 << 20, 8)  # bytes, number


@pytest.fixture
def broker(machine: Processes) -> Iterator[FakeBroker]:
    with closing(FakeBroker(machine.path)) as made:
        yield made


def welcome(broker: FakeBroker, *, known: bool) -> bytes:
    """Accept the client; return the arena and the token of its earlier connection."""
    broker.accept()
    hello = broker.expect("hello")
    broker.answer("welcome", *GRANULES, ARENA, TOKEN, int(known))
    return hello[-16:]


def test_a_revocation_before_an_answer_is_not_taken_for_it(
    machine: Processes, broker: FakeBroker, files: dict[str, Path]
) -> None:
    client = Process("pass", path=machine.path)
    try:
        client.result()
        client.begin(
            "runtime = Runtime('host', broker=path, tensors='numpy', broker_timeout=60)\n"
            "runtime.register('a', file)",
            file=files["a"],
        )
        assert welcome(broker, known=False) == bytes(16)
        broker.expect("enroll")
        broker.answer("done", 5)
        client.result()

        assert welcome(broker, known=True) == struct.pack("<QQ", ARENA, TOKEN)
        broker.expect("enroll")
        broker.say("revoke", 9, [0])  # of a model that it enrolls next
        broker.answer("done", 6)
        assert broker.expect("still_mapped") == struct.pack("<QQ", 0, 1)  # none; these are all
        client.begin("ticket = runtime.prewarm('a')")
        assert broker.expect("want")[:8] == struct.pack("<Q", 6)
        client.result()

        # This broker dies in the middle; the model is not refused by it.
        welcome(broker, known=True)
        broker.expect("enroll")
        welcome(broker, known=True)
        broker.expect("enroll")
        broker.answer("done", 7)
        assert broker.expect("want")[:8] == struct.pack("<Q", 7)
        assert not client.run("ticket.done")
    finally:
        client.end()
