"""Risk: a client gets no room although another has stopped using its layers, or takes layers that
another still uses."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from processes import Processes, expected, wait_until
from warmserve_rt import Busy, OutOfDeviceMemory


def test_two_clients_alternate_in_an_arena_for_one_model(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    one, two = machine.client(**files), machine.client(**files)
    for _ in range(5):
        assert one.run("weights('a')") == expected("a")
        assert two.run("weights('b')") == expected("b")
        wait_until(lambda: one.run("mapped('a')") == [])
    assert broker.run("runtime.snapshot().layers_evicted") >= 9 * 3
    broker.run("runtime.check_invariants()")


def test_a_lease_of_one_client_blocks_another_until_it_ends(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    holder, other = machine.client("engine-a", **files), machine.client(**files)
    holder.run("lease = runtime.lease('a').acquire()")
    with pytest.raises(TimeoutError):
        other.run("weights('b', timeout=0.1)")
    other.begin("weights('b')")
    assert not other.answered(0.2)
    assert holder.run("parts('a')") == expected("a")
    holder.run("lease.release()")
    assert other.answered(2)
    assert other.result() == expected("b")


def test_a_second_lease_of_a_wanted_layer_waits_its_turn(
    machine: Processes, files: dict[str, Path]
) -> None:
    """The holder leases step after step: the other client must get its turn between two leases."""
    machine.broker(8)
    holder, other = machine.client(**files), machine.client(**files)
    holder.run("lease = runtime.lease('a').acquire()")
    other.begin("weights('b')")
    time.sleep(0.1)  # b's request has met the lease
    holder.run("lease.release()")
    holder.begin("weights('a')")
    assert other.result() == expected("b")
    assert holder.result() == expected("a")


def test_an_eviction_refuses_or_waits_for_a_lease_of_another_client(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(16)
    holder, other = machine.client(**files), machine.client(**files)
    holder.run("lease = runtime.lease('a').acquire()")
    for wait in ("nothing", "streams"):
        with pytest.raises(Busy, match="'a'"):
            other.run("runtime.evict('a', wait=wait)", wait=wait)
    with pytest.raises(TimeoutError, match="'a'"):
        other.run("runtime.evict('a', wait='leases', timeout=0.1)")
    other.begin("runtime.evict('a', wait='leases')")
    assert not other.answered(0.2)
    assert holder.run("parts('a')") == expected("a")
    holder.run("lease.release()")
    other.result(2)
    assert holder.run("mapped('a')") == []
    assert broker.run("runtime.snapshot().granules_free") == 8


def test_layers_that_another_client_leases_are_not_chosen_as_victims(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(16)
    one, two = machine.client(**files), machine.client(**files)
    one.run("lease = runtime.lease('a').acquire()")
    two.run("runtime.prewarm('b').wait()")
    assert two.run("weights('c')") == expected("c")  # in place of b
    assert one.run("parts('a')") == expected("a")
    assert two.run("mapped('b')") == []
    broker.run("runtime.check_invariants()")


def test_keep_values_of_one_client_choose_the_victims_of_another(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(16, patience=5.0)  # so that no layer counts as used because a CPU is busy
    one, two = machine.client(**files), machine.client(**files)
    one.run("runtime.set_keep_value('a', 5.0)")
    assert one.run("weights('a')") == expected("a")
    assert one.run("weights('b')") == expected("b")
    assert two.run("weights('c')") == expected("c")
    assert one.run("mapped('a')") == [0, 1, 2]
    assert one.run("mapped('b')") == []


def test_a_model_that_is_larger_than_the_arena_is_refused(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(6)
    client = machine.client(**files)
    with pytest.raises(OutOfDeviceMemory):
        client.run("weights('a')")
    with pytest.raises(OutOfDeviceMemory):
        client.run("runtime.prewarm('a')")
    client.run("runtime.prewarm('a', layers=[2]).wait()")
    assert client.run("mapped('a')") == [2]


def test_a_wait_for_room_ends_with_the_client_that_waits(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    holder, waiting, third = (machine.client(**files) for _ in range(3))
    holder.run("lease = runtime.lease('a').acquire()")
    waiting.begin("weights('b')")
    time.sleep(0.05)
    third.begin("weights('c')")
    time.sleep(0.05)
    waiting.kill()
    holder.run("lease.release()")
    assert third.result(5) == expected("c")
    broker.run("runtime.check_invariants()")


def test_a_client_that_closes_while_it_waits_gets_no_layers(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    holder, waiting = machine.client(**files), machine.client(**files)
    holder.run("lease = runtime.lease('a').acquire()")
    waiting.run("ticket = runtime.prewarm('b')")
    waiting.run("runtime.close()")  # its process, and the connection, remain
    holder.run("lease.release()")
    time.sleep(0.2)
    begin = time.monotonic()
    for name in "bca":
        assert holder.run("weights(name)", name=name) == expected(name)
    assert time.monotonic() - begin < 2
    broker.run("runtime.check_invariants()")
