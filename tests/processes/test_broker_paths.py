"""Risk: a broker listens where others can take its place, or a user cannot tell why it does not."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

import pytest
from wire import Wire

from processes import Processes, expected
from warmserve_rt import Broker, Runtime, WarmServeError


@pytest.fixture
def runtime() -> Runtime:
    return Runtime("host", arena="2MiB", tensors="numpy", loaders=1)


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o701, 0o722])
def test_a_folder_that_others_may_enter_is_refused(
    runtime: Runtime, tmp_path: Path, mode: int
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    folder.chmod(mode)
    with runtime, pytest.raises(WarmServeError, match=rf"0700, and {folder}/ does not"):
        Broker(runtime, folder / "broker.sock")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_of_another_user_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir(mode=0o700)
    os.chown(folder, 65534, 65534)
    with runtime, pytest.raises(WarmServeError, match="must belong to its user"):
        Broker(runtime, folder / "broker.sock")


def test_the_folder_is_made_for_this_user_only(runtime: Runtime, tmp_path: Path) -> None:
    path = tmp_path / "run" / "broker.sock"
    with runtime, Broker(runtime, path) as broker:
        assert broker.path == path
        assert path.parent.stat().st_mode & 0o777 == 0o700
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_a_path_longer_than_a_sockets_address_works(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.path = machine.path.parent / ("long" * 30) / "broker.sock"
    assert len(str(machine.path)) > 108
    machine.path.parent.mkdir(parents=True, mode=0o700)
    machine.broker(8)
    assert machine.client(**files).run("weights('a')") == expected("a")


def test_a_name_longer_than_a_sockets_address_is_refused(runtime: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with runtime, pytest.raises(ValueError, match="name of the socket is too long"):
        Broker(runtime, folder / ("x" * 120))


def test_a_relative_path_works(
    runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o700)
    monkeypatch.chdir(tmp_path)
    with runtime, Broker(runtime, "broker.sock"):
        Runtime("host", broker="broker.sock", loaders=1).close()


def test_the_socket_of_a_killed_broker_is_replaced(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8).kill()
    assert machine.path.is_socket()
    with pytest.raises(WarmServeError, match=f"that listened at {machine.path} has ended"):
        Runtime("host", broker=machine.path)
    machine.broker(8)
    assert machine.client(**files).run("weights('a')") == expected("a")


def test_a_second_broker_at_a_path_is_refused(machine: Processes, files: dict[str, Path]) -> None:
    machine.broker(8)
    client = machine.client(**files)
    with pytest.raises(WarmServeError, match=f"another broker listens at {machine.path}"):
        machine.broker(8)
    assert client.run("weights('a')") == expected("a")
    machine.client(**files)


def test_a_broker_does_not_remove_a_file(runtime: Runtime, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "weights"
    path.write_bytes(b"precious")
    with runtime, pytest.raises(WarmServeError, match=f"{path}: it exists already"):
        Broker(runtime, path)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM])
def test_the_socket_of_another_program_is_left_to_it(
    runtime: Runtime, tmp_path: Path, kind: socket.SocketKind
) -> None:
    tmp_path.chmod(0o700)
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind != socket.SOCK_DGRAM:
            other.listen()
        with runtime, pytest.raises(WarmServeError, match=f"another program listens at {path}"):
            Broker(runtime, path)
        assert path.is_socket()
        if kind != socket.SOCK_SEQPACKET:  # a client of that would wait ten seconds for an answer
            with pytest.raises(WarmServeError, match="the socket of another program"):
                Runtime("host", broker=path)


def test_a_program_that_answers_otherwise_is_no_broker(tmp_path: Path) -> None:
    path = tmp_path / "other.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        other.bind(str(path))
        other.listen()
        other.setblocking(False)
        with Wire(path, hello=False) as wire:
            wire.send(b"hello")
            with other.accept()[0] as taken:
                taken.send(b"220 mail.example ESMTP")
        made = tmp_path / "none.sock"
    with pytest.raises(WarmServeError, match=f"no broker listens at {made}"):
        Runtime("host", broker=made)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("arena", "1MiB"),
        ("headroom", "1MiB"),
        ("granule", "2MiB"),
        ("host_cache", "1MiB"),
        ("poison", True),
        ("routes", ["cuda:1"]),
    ],
)
def test_options_of_the_arena_are_refused(option: str, value: object, tmp_path: Path) -> None:
    said = f"{option} must not be given with broker, which owns the arena"
    with pytest.raises(ValueError, match=said):
        Runtime("host", broker=tmp_path / "none", **{option: value})


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_only_the_host_has_brokers(device: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device must be \"host\" with broker, got '{device}'"):
        Runtime(device, broker=tmp_path / "none")


@pytest.mark.parametrize("patience", [-1, "long", float("nan")])
def test_a_patience_that_is_no_time_is_refused(
    runtime: Runtime, tmp_path: Path, patience: float
) -> None:
    with runtime, pytest.raises((ValueError, TypeError), match="patience"):
        Broker(runtime, tmp_path / "run" / "broker.sock", patience=patience)


def test_what_a_client_cannot_do_is_refused_in_words(
    machine: Processes, files: dict[str, Path]
) -> None:
    machine.broker(8)
    client = machine.client(a=files["a"])
    for request, said in {
        "runtime.register('w', path, writable=True)": "a writable model",
        "runtime.reload('a')": "reload()",
        "runtime.trim()": "trim()",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said) + " is not available"):
            client.run(request, path=files["b"])
    assert client.run("weights('a')") == expected("a")


def test_the_runtime_of_a_client_cannot_be_served(machine: Processes) -> None:
    machine.broker(8)
    client = machine.client()
    with pytest.raises(ValueError, match="broker's arena"):
        client.run("Broker(runtime, str(path) + '2').path")


# The limit is what the process has open, so that the kernel drops the descriptors that it is sent.
AT_THE_LIMIT = """
import resource
before = resource.getrlimit(resource.RLIMIT_NOFILE)
most = max(map(int, os.listdir('/proc/self/fd')))
held = [os.open('/dev/null', os.O_RDONLY) for _ in range(8)]
while held and held[-1] < most: held.append(os.open('/dev/null', os.O_RDONLY))
resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, before[1]))
"""


def test_a_client_with_too_many_open_files_gets_an_error_and_can_go_on(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    full, other = machine.client(**files), machine.client(**files)
    full.run(AT_THE_LIMIT)
    for _ in range(2):
        with pytest.raises(WarmServeError, match="too many open files"):
            full.run("weights('a')")
    assert other.run("weights('b')") == expected("b")  # in place of a
    full.run("resource.setrlimit(resource.RLIMIT_NOFILE, before)")
    assert full.run("weights('a')") == expected("a")
    broker.run("runtime.check_invariants()")


def test_a_broker_with_too_many_open_files_refuses_a_model_and_serves_others(
    machine: Processes, files: dict[str, Path]
) -> None:
    broker = machine.broker(8)
    client, late = machine.client(a=files["a"]), machine.client()
    broker.run(AT_THE_LIMIT)
    with pytest.raises(WarmServeError, match="too many open files"):
        late.run("runtime.register('b', path)", path=files["b"])
    broker.run("resource.setrlimit(resource.RLIMIT_NOFILE, before)")
    assert client.run("weights('a')") == expected("a")
    assert machine.client(**files).run("weights('b')") == expected("b")
