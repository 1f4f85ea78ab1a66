"""Risk: a process that dies, stops or does not answer harms others, or a lease is wrong."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from checkpoints import GRANULE, write_model

from processes import Process, Processes, expected, wait_until
from warmserve_rt import WarmServeError

# Holds the interpreter's lock, which time.sleep() does not.
SLEEP_WITH_THE_LOCK = "ctypes.PyDLL(None).usleep({})"


def test_granules_of_a_killed_client_come_back(machine: Processes, files: dict[str, Path]) -> None:
    broker = machine.broker(8)
    killed, other = machine.client(**files), machine.client(**files)
    killed.run("lease = runtime.lease('a').acquire()")
    other.begin("weights('b')")
    assert not other.answered(0.2)
    killed.kill()
    begin = time.monotonic()
    assert other.result() == expected("b")
    assert time.monotonic() - begin < 2
    assert machine.client_state(killed) is None
    broker.run("runtime.check_invariants()")


def test_a_client_killed_in_the_middle_of_a_load_leaves_nothing_behind(
    machine: Processes, tmp_path: Path
) -> None:
    sizes = [GRANULE] * 4
    files = {name: write_model(tmp_path / name, name, sizes) for name in "ab"}
    broker = machine.broker(8, read_bandwidth=20 * GRANULE)
    killed, other = machine.client(**files), machine.client(**files)
    killed.begin("weights('a')")
    time.sleep(0.1)
    killed.kill()
    assert other.run("weights('b')") == expected("b", sizes)
    wait_until(lambda: all(model.leases == 0 for model in machine.state().models))
    broker.run("runtime.check_invariants()")


def test_layers_of_a_stopped_client_stay_and_others_are_evicted(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(16)
    stopped, other = machine.client(**files), machine.client(**files)
    assert stopped.run("weights('a')") == expected("a")  # the least recently used
    assert other.run("weights('b')") == expected("b")
    stopped.stop()
    assert other.run("weights('c')") == expected("c")
    assert other.run("mapped('b')") == []
    state = machine.client_state(stopped)
    assert state is not None
    assert state.stuck
    assert [model.model for model in state.mapped] == ["a"]
    assert state.mapped[0].layers == 3
    assert state.mapped[0].layers_held > 0
    stopped.go_on()
    # It gives up what it was asked for. The rest was not asked for: layers of `b` were evicted.
    wait_until(lambda: len(stopped.run("mapped('a')")) < 3)
    state = machine.client_state(stopped)
    assert state is not None
    assert not state.stuck
    assert all(model.layers_held == 0 for model in state.mapped)
    assert stopped.run("weights('a')") == expected("a")
    broker.run("runtime.check_invariants()")


def test_a_stopped_client_delays_a_load_of_many_layers_once(
    machine: Processes, tmp_path: Path
) -> None:
    sizes = [4096] * 8  # a granule each
    files = {name: write_model(tmp_path / name, name, sizes) for name in "abc"}
    patience = 0.5
    machine.broker(32, patience=patience)
    stopped, other = machine.client(**files), machine.client(**files)
    stopped.run("weights('a')")
    other.run("weights('b')")
    stopped.stop()
    begin = time.monotonic()
    assert other.run("weights('c')") == expected("c", sizes)
    assert patience < time.monotonic() - begin < 4 * patience


def test_a_load_waits_for_a_stopped_client_if_nothing_else_can_be_evicted(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    stopped, other = machine.client("stopped", **files), machine.client(**files)
    assert stopped.run("weights('a')") == expected("a")
    stopped.stop()
    with pytest.raises(TimeoutError):
        other.run("weights('b', timeout=0.4)")
    other.begin("weights('b')")
    assert not other.answered(0.3)
    stopped.go_on()
    assert other.result() == expected("b")
    assert stopped.run("mapped('a')") == []


def test_granules_of_a_client_that_is_killed_while_it_is_stopped_come_back(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    stopped, other = machine.client(**files), machine.client(**files)
    stopped.run("lease = runtime.lease('a').acquire()")
    stopped.stop()
    other.begin("weights('b')")
    assert not other.answered(0.3)
    stopped.kill()
    assert other.result() == expected("b")


def test_a_lease_of_a_stopped_client_is_right_when_it_goes_on(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    stopped, other = machine.client(**files), machine.client(**files)
    stopped.run("lease = runtime.lease('a').acquire()")
    stopped.stop()
    with pytest.raises(TimeoutError):
        other.run("weights('b', timeout=0.4)")
    stopped.go_on()
    assert stopped.run("parts('a')") == expected("a")
    other.begin("weights('b')")
    assert not other.answered(0.2)
    stopped.run("lease.release()")
    assert other.result() == expected("b")


def test_a_client_answers_while_python_holds_the_interpreter_lock(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8, patience=60)
    busy, other = machine.client(**files), machine.client(**files)
    busy.run("weights('a')")
    busy.begin(SLEEP_WITH_THE_LOCK.format(3_000_000))
    time.sleep(0.05)
    assert other.run("weights('b')") == expected("b")
    assert not busy.answered()


def test_an_eviction_ends_in_time_while_the_broker_is_stopped(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(16)
    holder, other = machine.client(**files), machine.client(**files)
    holder.run("lease = runtime.lease('a').acquire()")
    broker.stop()
    with pytest.raises(TimeoutError, match=f"{machine.path} did not answer in time"):
        other.run("runtime.evict('a', timeout=0.1)")
    broker.go_on()  # its answer, a TimeoutError, comes late
    assert other.run("weights('b')") == expected("b")
    assert other.run("weights('a')") == expected("a")


def test_an_interrupted_eviction_leaves_the_connection_as_it_was(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(16)
    holder, other = machine.client(**files), machine.client(**files)
    holder.run("lease = runtime.lease('a').acquire()")
    other.begin(
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "interrupted = False\n"
        "try: runtime.evict('a', timeout=0.4)\n"
        "except KeyboardInterrupt: interrupted = True"
    )
    time.sleep(0.15)
    other.signal(signal.SIGINT)
    other.result()
    assert other.run("interrupted")
    time.sleep(0.5)  # the answer has come
    assert other.run("weights('b')") == expected("b")


def test_a_child_of_a_dead_client_keeps_no_granule_and_reads_none(
    machine: Processes, files: dict[str, Path], tmp_path: Path
) -> None:
    machine.broker(8)
    parent, other = machine.client(**files), machine.client(**files)
    said, go_on = tmp_path / "said", tmp_path / "go on"
    for fifo in (said, go_on):
        os.mkfifo(fifo)
    parent.run("lease = runtime.lease('a').acquire()")
    parent.begin(
        "view = next(iter(runtime.tensors('a').values()))\n"
        "if os.fork() == 0:\n"
        "    out = os.open(said, os.O_WRONLY)\n"
        "    os.write(out, b'lives')\n"
        "    os.open(go_on, os.O_RDONLY)\n"
        "    os.write(out, b'read ' + view[:4].tobytes())\n"
        "    os._exit(0)",
        said=said,
        go_on=go_on,
    )
    with said.open("rb") as hear:
        assert hear.read(5) == b"lives"
        parent.result()
        other.begin("weights('b')")
        assert not other.answered(0.1)
        parent.kill()
        assert other.result() == expected("b")
        go_on.open("wb").close()
        assert hear.read() == b""  # it faulted


def read_at(process: Process, address: int) -> int | None:
    """Let the process read an address, and return its exit status."""
    process.begin(f"ctypes.string_at({address}, 1)")
    return process.exitcode()


def test_a_read_outside_of_a_lease_faults_when_another_client_has_taken_the_granules(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    reader, other = machine.client(**files), machine.client(**files)
    assert reader.run("weights('a')") == expected("a")
    address = reader.run("next(iter(runtime.tensors('a').values())).ctypes.data")
    assert reader.run(f"ctypes.string_at({address}, 64)") == expected("a")[0][:64]  # still mapped
    assert other.run("weights('b')") == expected("b")
    assert read_at(reader, address) == -signal.SIGSEGV


def test_a_write_into_weights_faults(machine: Processes, files: dict[str, Path]) -> None:
    machine.broker(8)
    writer, other = machine.client(**files), machine.client(**files)
    writer.run("lease = runtime.lease('a').acquire()")
    writer.begin("ctypes.memset(next(iter(runtime.tensors('a').values())).ctypes.data, 0, 1)")
    assert writer.exitcode() == -signal.SIGSEGV
    assert other.run("weights('a')") == expected("a")


def test_layers_that_are_mapped_can_be_leased_after_the_broker_has_ended(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    client = machine.client(**files)
    assert client.run("weights('a')") == expected("a")
    broker.kill()
    assert client.run("weights('a')") == expected("a")


def test_a_runtime_takes_no_granule_of_a_client_after_it_was_served(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    client = machine.client(**files)
    client.run("lease = runtime.lease('a').acquire()")
    broker.run(
        "import gc\nbroker.close()\ndel broker\ngc.collect()\nruntime.register('own', path)",
        path=files["b"],
    )
    with pytest.raises(TimeoutError):
        broker.run("weights('own', timeout=0.3)")
    assert client.run("parts('a')") == expected("a")
    broker.run("runtime.check_invariants()")


@pytest.mark.parametrize("end", ["killed", "closed"])
def test_leases_go_on_after_the_broker_has_ended(
    machine: Processes, files: dict[str, Path], end: str
) -> None:
    broker = machine.broker(16)
    client, waiting = machine.client(**files), machine.client(**files)
    client.run("lease = runtime.lease('b').acquire()")
    client.run("more = runtime.lease('a').acquire()")
    waiting.begin("weights('c')")
    assert not waiting.answered(0.2)
    if end == "killed":
        broker.kill()
    else:
        broker.run("import gc\nbroker.close()\nruntime.close()\ndel broker, runtime\ngc.collect()")
    with pytest.raises(WarmServeError, match=str(machine.path)):
        waiting.result()
    assert client.run("parts('b')") == expected("b")
    client.run("lease.release()\nmore.release()")
    for request in (
        "runtime.prewarm('c').wait()",
        "weights('c')",
        "runtime.evict('b')",
        "runtime.set_keep_value('b', 1.0)",
        "runtime.register('d', files['a'])",
    ):
        with pytest.raises(WarmServeError, match=str(machine.path)):
            client.run(request, files=files)
    client.run("runtime.check_invariants()")
    client.run("runtime.close()")
    with pytest.raises(WarmServeError, match=str(machine.path)):
        client.run("Runtime('host', broker=path)")
