"""Risk: a broker that its keeper starts again loads layers again, forgets what clients map, or
takes granules that a client still reads."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import pytest
from checkpoints import GRANULE, write_model

from processes import SIZES, Process, Processes, expected, wait_until
from warmserve_rt import CorruptCheckpoint, WarmServeError
from warmserve_rt.core.keeper import _follow


def loaded(machine: Processes) -> int:
    return machine.state().bytes_loaded


def is_back(machine: Processes, client: Process) -> bool:
    """Return whether the client is connected."""
    state = machine.client_state(client)
    return state is not None and not state.ended


def back(machine: Processes, *clients: Process) -> None:
    """Wait until clients have connected to a new broker."""
    wait_until(lambda: all(is_back(machine, each) for each in clients))


def test_a_new_client_reads_what_the_last_broker_has_loaded(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.kept_broker(16)
    first = machine.client(**files)
    assert first.run("weights('a'), weights('b')") == (expected("a"), expected("b"))
    assert loaded(machine) > 0
    first.kill()
    broker.kill_broker()
    assert loaded(machine) == 0
    second = machine.client(**files)
    assert second.run("weights('b'), weights('a')") == (expected("b"), expected("a"))
    assert loaded(machine) == 0
    assert second.run("weights('c')") == expected("c")
    assert loaded(machine) > 0
    broker.run("runtime.check_invariants()")


def test_layers_stay_mapped_over_a_restart(machine: Processes, files: dict[str, Path]) -> None:
    broker = machine.kept_broker(16)
    client = machine.client(**files)
    client.run("lease = runtime.lease('a').acquire()")
    epoch = client.run("runtime.model('a').backing_epoch")
    broker.kill_broker()
    assert client.run("parts('a')") == expected("a")
    assert client.run("weights('b')") == expected("b")  # the new broker loads it
    assert client.run("runtime.model('a').backing_epoch") == epoch
    client.run("lease.release()\nruntime.check_invariants()")
    broker.run("runtime.check_invariants()")
    assert machine.state().granules_free == 0  # the new broker has made the layers resident


def test_a_client_that_has_come_back_gives_layers_up(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.kept_broker(8)
    client, other = machine.client(**files), machine.client(**files)
    assert client.run("weights('a')") == expected("a")
    address = client.run("next(iter(runtime.tensors('a').values())).ctypes.data")
    broker.kill_broker()
    back(machine, client, other)
    assert other.run("weights('b')") == expected("b")
    assert client.run("mapped('a')") == []
    assert client.run("weights('a')") == expected("a")
    assert other.run("weights('b')") == expected("b")
    client.begin(f"ctypes.string_at({address}, 1)")
    assert client.exitcode() == -signal.SIGSEGV
    broker.run("runtime.check_invariants()")


def test_a_lease_that_a_restart_has_met_is_waited_for(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.kept_broker(8)
    client, other = machine.client(**files), machine.client(**files)
    client.run("lease = runtime.lease('a').acquire()")
    broker.kill_broker()
    back(machine, client, other)
    other.begin("weights('b')")
    assert not other.answered(0.3)
    assert client.run("parts('a')") == expected("a")
    client.run("lease.release()")
    assert other.result() == expected("b")


def test_a_client_that_is_stopped_over_a_restart_keeps_its_granules(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.kept_broker(16)
    stopped, other = machine.client("stopped", **files), machine.client(**files)
    stopped.run("lease = runtime.lease('a').acquire()")
    stopped.stop()
    broker.kill_broker()
    for model in "bcbc":  # in the half that is left
        assert other.run(f"weights('{model}')") == expected(model)
    state = machine.client_state(stopped)
    assert state is not None
    assert (state.name, state.ended) == ("stopped", True)
    stopped.go_on()
    assert stopped.run("parts('a')") == expected("a")
    stopped.run("lease.release()")
    back(machine, stopped)
    both = "with runtime.lease(['b', 'c']): both = parts('b'), parts('c')"
    other.run(both)
    assert other.run("both") == (expected("b"), expected("c"))
    assert stopped.run("mapped('a')") == []
    broker.run("runtime.check_invariants()")


def test_others_read_the_layers_of_a_stopped_client_without_loading(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.kept_broker(8)
    stopped, other = machine.client(**files), machine.client(**files)
    stopped.run("weights('a')")
    stopped.stop()
    broker.kill_broker()
    assert other.run("weights('a')") == expected("a")
    assert loaded(machine) == 0
    with pytest.raises(TimeoutError):  # the stopped client may still read `a`
        other.run("weights('b', timeout=0.5)")
    stopped.kill()
    assert other.run("weights('b')") == expected("b")
    broker.run("runtime.check_invariants()")


def test_granules_of_a_stopped_client_stay_although_a_load_of_its_layers_fails(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.kept_broker(16)
    stopped, other = machine.client(**files), machine.client(**files)
    stopped.run("lease = runtime.lease('a').acquire()")
    stopped.stop()
    broker.kill_broker()
    broker.run("faulty.arm([(1, None)], only='map')")
    with pytest.raises(WarmServeError, match="map"):
        other.run("weights('a')")
    broker.run("faulty.disarm()")
    for model in "bcb":
        assert other.run(f"weights('{model}')") == expected(model)
    stopped.go_on()
    assert stopped.run("parts('a')") == expected("a")
    stopped.run("lease.release()")
    other.run("with runtime.lease(['b', 'c'], timeout=20): pass")
    broker.run("runtime.check_invariants()")


def test_a_file_that_was_touched_does_not_matter_to_who_still_maps_it(
    machine: Processes, files: dict[str, Path], tmp_path: Path
) -> None:
    own = {**files, "a": write_model(tmp_path / "a", "a", SIZES)}
    broker = machine.kept_broker(16)
    client, other = machine.client(**own), machine.client(**own)
    client.run("lease = runtime.lease('a').acquire()")
    os.utime(own["a"], (1, 1))
    broker.kill_broker()
    back(machine, client, other)
    assert other.run("weights('a')") == expected("a")
    client.run("lease.release()")
    other.run("with runtime.lease(['b', 'c'], timeout=20): pass")
    with pytest.raises(CorruptCheckpoint):
        other.run("weights('a')")
    broker.run("runtime.check_invariants()")


BREAK = """
for each in os.listdir('/proc/self/fd'):
    try: found = socket.socket(fileno=os.dup(int(each)))
    except OSError: continue
    if found.type == socket.SOCK_SEQPACKET: found.shutdown(socket.SHUT_RDWR)
"""


def test_a_client_whose_connection_breaks_continues(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    client, other = machine.client(**files), machine.client(**files)
    assert client.run("weights('a')") == expected("a")
    epoch = client.run("runtime.model('a').backing_epoch")
    client.run(BREAK)
    wait_until(lambda: len(machine.state().clients) == 3 and is_back(machine, client))
    assert client.run("mapped('a'), runtime.model('a').backing_epoch") == ([0, 1, 2], epoch)
    assert other.run("weights('b')") == expected("b")
    assert client.run("mapped('a')") == []
    assert client.run("weights('a')") == expected("a")
    broker.run("runtime.check_invariants()")


def test_granules_of_a_client_that_died_without_a_broker_come_back(
    machine: Processes, files: dict[str, Path]
) -> None:
    keeper = machine.kept_broker(8)
    killed, other = machine.client(**files), machine.client(**files)
    killed.run("lease = runtime.lease('a').acquire()")
    broker = keeper.broker_pid()
    keeper.stop()
    os.kill(broker, signal.SIGKILL)
    killed.kill()
    keeper.go_on()
    keeper.result()
    assert other.run("weights('b')") == expected("b")
    assert machine.client_state(killed) is None
    keeper.run("runtime.check_invariants()")


def test_a_broker_that_is_killed_while_it_loads_loads_the_rest_again(
    machine: Processes, tmp_path: Path
) -> None:
    sizes = [GRANULE] * 8
    model = write_model(tmp_path / "a", "a", sizes)
    broker = machine.kept_broker(16, read_bandwidth=40 * GRANULE)
    client = machine.client(a=model)
    client.begin("weights('a')")
    wait_until(lambda: loaded(machine) >= 3 * GRANULE)
    broker.kill_broker()
    assert client.result() == expected("a", sizes)
    assert 0 < loaded(machine) <= 5 * GRANULE
    broker.run("runtime.check_invariants()")


def test_a_client_that_has_ended_is_not_kept(machine: Processes, files: dict[str, Path]) -> None:
    broker = machine.kept_broker(8)
    closed, killed = machine.client(**files), machine.client(**files)
    for client in (closed, killed):
        client.run("weights('a')")
    closed.run("runtime.close()")
    killed.kill()
    wait_until(lambda: machine.client_state(killed) is None)
    broker.kill_broker()
    assert broker.run("len(kept.clients)") == 0


def test_a_second_restart_is_as_the_first(machine: Processes, files: dict[str, Path]) -> None:
    broker = machine.kept_broker(16)
    client, other = machine.client(**files), machine.client(**files)
    client.run("lease = runtime.lease('a').acquire()")
    for model in "bcb":
        broker.kill_broker()
        assert other.run(f"weights('{model}')") == expected(model)
        assert client.run("parts('a')") == expected("a")
    broker.kill_broker()
    broker.kill_broker()  # before clients have come back
    client.run("lease.release()")
    assert other.run("weights('c')") == expected("c")
    assert client.run("weights('a')") == expected("a")
    broker.run("runtime.check_invariants()")


def test_a_keeper_that_is_killed_ends_its_broker(machine: Processes) -> None:
    keeper = machine.kept_broker(8)
    pid = keeper.broker_pid()
    keeper.kill()
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "\nState:\tZ" in status(pid))


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return ""


def test_a_keeper_that_loses_descriptors_of_a_client_ends() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(theirs, [b"keep 7"], [ours.fileno()])  # one of two
        with pytest.raises(WarmServeError, match="too many open files"):
            _follow(ours, {})


def test_a_broker_that_dies_again_and_again_is_given_up(machine: Processes) -> None:
    with pytest.raises(WarmServeError, match="died 3 times in a row, at last with signal 9"):
        machine.process(
            "from warmserve_rt.core.keeper import fork_broker\n"
            "kept = fork_broker(4, 2 << 20, most_deaths=2)\n"
            "kept.serving()\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_ends_the_broker_and_its_keeper(
    machine: Processes, number: str, code: int
) -> None:
    keeper = machine.kept_broker(8)
    pid = keeper.broker_pid()
    time.sleep(0.05)  # the keeper reads that it serves
    keeper.signal(getattr(signal, number))
    assert keeper.exitcode() == code
    assert not Path(f"/proc/{pid}").exists()


def test_layers_of_another_arena_are_given_up_when_nothing_holds_them(
    machine: Processes, files: dict[str, Path]
) -> None:
    keeper = machine.kept_broker(8)
    client = machine.client(**files)
    client.run("lease = runtime.lease('a').acquire()")
    keeper.kill()
    machine.kept_broker(8)
    assert client.run("parts('a')") == expected("a")
    client.run("lease.release()")
    wait_until(lambda: client.run("mapped('a')") == [])
    assert client.run("weights('a')") == expected("a")
