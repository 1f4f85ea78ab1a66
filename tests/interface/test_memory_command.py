"""Risk: the broker's command leaves clients without their bytes, destroys a file, does not end when
told to, or its status is wrong or needs packages that only engines have."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from checkpoints import content, write_model

from warmserve_rt import Runtime, WarmServeError
from warmserve_rt.core.broker_status import broker_status

pytest.importorskip("typer")

SIZES = (3 << 20, 1 << 20)  # two granules and one
LAYER = "model.layers.0.weight"


def words(*arguments: str | Path, block: Iterable[str] = ()) -> list[str | Path]:
    """Return the command ``warmserve-rt memory`` in a process without the modules in ``block``."""
    blocked = "".join(f"sys.modules[{name!r}] = None\n" for name in block)
    # A shell starts background jobs with SIGINT ignored, and the tests may run in one.
    heard = "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code = f"{heard}{blocked}from warmserve_rt.cli import main\nmain()"
    return [sys.executable, "-c", code, "memory", *arguments]


OPTIONS: Any = {"env": {**os.environ, "COLUMNS": "200"}, "cwd": "/", "text": True}


def run(*arguments: str | Path, block: Iterable[str] = ()) -> tuple[int, str, str]:
    """Run ``warmserve-rt memory`` and return its status, its output and its messages."""
    command = words(*arguments, block=block)
    done = subprocess.run(command, **OPTIONS, capture_output=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


@contextmanager
def served(path: Path, arena: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        words("serve", path, "--arena", arena),
        **OPTIONS,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout
        assert process.stdout.readline() == f"serving {arena[:-3]} {arena[-3:]} at {path}\n"
        assert process.stdout.readline() == f'Runtime("host", broker="{path}") leases from it.\n'
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return the socket of a broker with an arena of four granules."""
    path = tmp_path_factory.mktemp("served") / "broker.sock"
    with served(path, "8MiB"):
        yield path


def client(path: Path, name: str, checkpoint: Path) -> Runtime:
    runtime = Runtime("host", broker=path, name=name, tensors="numpy")
    runtime.register(checkpoint.name, checkpoint)
    return runtime


def layers_held(path: Path, name: str) -> int:
    (found,) = (each for each in broker_status(path).clients if each.name == name)
    return sum(each.layers_held for each in found.mapped)


def test_status_shows_models_clients_and_free_memory(broker: Path, tmp_path: Path) -> None:
    assert "8 MiB of 8 MiB are free" in run("status", broker)[1]
    chat = write_model(tmp_path / "chat", "a", SIZES)
    code = write_model(tmp_path / "code", "b", SIZES)
    with (
        client(broker, "engine [1]", chat) as one,
        client(broker, "other", code) as other,
        one.lease("chat"),
    ):
        other.prewarm("code")  # asks for the room of the leased layers
        while layers_held(broker, "engine [1]") < 2:
            time.sleep(0.01)
        status, out, _ = run("status", broker, block=("torch", "numba"))
        found = json.loads(run("status", broker, "--json")[1])
    assert status == 0
    rows = [line.split("  ") for line in out.splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert cells[0] == [f"{broker}: 2 MiB of 8 MiB are free, in granules of 2 MiB"]
    assert ["chat", "4 MiB", "4 MiB"] in cells
    assert ["code", "4 MiB", "0 B"] in cells
    assert ["engine [1]", str(os.getpid()), "4 MiB", "2", "2", "connected"] in cells
    assert ["other", str(os.getpid()), "0 B", "0", "0", "connected"] in cells
    clients = {each["name"]: each for each in found.pop("clients")}
    assert found == {
        "granule_bytes": 2 << 20,
        "granules": 4,
        "granules_free": 1,
        "nbytes_loaded": 4 << 20,
        "models": [
            {"name": "chat", "nbytes": 4 << 20, "nbytes_resident": 4 << 20},
            {"name": "code", "nbytes": 4 << 20, "nbytes_resident": 0},
        ],
    }
    assert clients["engine [1]"] == {
        "process": os.getpid(),
        "name": "engine [1]",
        "stuck": False,
        "ended": False,
        "mapped": [{"name": "chat", "layers": 2, "layers_held": 2, "nbytes": 4 << 20}],
    }
    assert clients["other"]["mapped"] == []
    assert broker_status(broker).clients == ()


def test_a_client_that_does_not_answer_is_shown_as_stuck(broker: Path, tmp_path: Path) -> None:
    silent = Runtime("host", broker=broker, pump=True, tensors="numpy")  # answers in step() only
    silent.register("silent", write_model(tmp_path / "silent", "c", SIZES))
    ticket = silent.prewarm("silent")
    while not ticket.done:
        silent.step()
    with client(broker, "other", write_model(tmp_path / "other", "d", SIZES)) as other:
        other.prewarm("other")
        while "stuck" not in run("status", broker)[1]:
            pass
    silent.close()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_broker_that_ends_leaves_clients_what_they_have_mapped(
    number: int, status: int, tmp_path: Path
) -> None:
    path = tmp_path / "run" / "broker.sock"
    with served(path, "8MiB") as process:
        runtime = client(path, "engine", write_model(tmp_path / "m", "a", SIZES))
        with runtime.lease("m"):
            pass
        process.send_signal(number)
        assert process.wait(10) == status
        assert process.communicate() == ("", "")
    assert not path.exists()
    with runtime.lease("m") as lease:
        assert lease.tensors[LAYER].tobytes() == content("a", 0, SIZES[0])
    runtime.close()


def test_a_broker_that_dies_is_started_again_and_loads_nothing_again(tmp_path: Path) -> None:
    path = tmp_path / "run" / "broker.sock"
    with served(path, "8MiB") as process:
        runtime = client(path, "engine", write_model(tmp_path / "m", "a", SIZES))
        with runtime.lease("m") as lease:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            (died,) = map(int, children.read_text().split())
            os.kill(died, signal.SIGKILL)
            assert process.stdout
            assert process.stdout.readline().startswith("serving 8 MiB at ")
            assert lease.tensors[LAYER].tobytes() == content("a", 0, SIZES[0])
        with client(path, "other", tmp_path / "m") as other, other.lease("m") as lease:
            assert lease.tensors[LAYER].tobytes() == content("a", 0, SIZES[0])
        assert broker_status(path).nbytes_loaded == 0
        process.terminate()
        assert process.wait(10) == 0
        said = process.communicate()[1]
    runtime.close()
    assert said == (
        f"warmserve-rt memory: the broker, process {died}, died with signal 9, "
        "and is started again\n"
    )


def test_a_second_broker_is_refused_before_it_takes_memory(broker: Path) -> None:
    status, _, messages = run("serve", broker, "--arena", "1TiB")
    assert (status, "another broker listens at" in messages) == (1, True)
    assert broker_status(broker).granules == 4


def test_failures_are_reported_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "broker.sock"
    status, _, messages = run("status", path)
    assert (status, messages) == (1, f"warmserve-rt memory: no broker listens at {path}\n")
    status, _, messages = run("serve", path, "--arena", "1TiB")
    assert (status, "does not fit" in messages) == (1, True)
    tmp_path.chmod(0o755)
    for arguments in (["status", path], ["serve", path, "--arena", "2MiB"]):
        status, _, messages = run(*arguments)
        assert (status, "mode 0700" in messages, messages.count("\n")) == (1, True, 1)
    assert not path.exists()


def test_a_file_at_the_path_is_not_replaced(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "a", [5])
    before = path.read_bytes()
    status, _, messages = run("serve", path, "--arena", "2MiB")
    assert (status, "exists already" in messages) == (1, True)
    assert path.read_bytes() == before


def test_a_socket_that_another_user_could_have_made_is_not_connected_to(broker: Path) -> None:
    broker.parent.chmod(0o750)
    try:
        with pytest.raises(WarmServeError, match="mode 0700"):
            broker_status(broker)
    finally:
        broker.parent.chmod(0o700)


@pytest.mark.parametrize(
    ("arguments", "accepted"),
    [
        ([], "--arena"),
        (["--arena", "big"], "'256MiB'"),
        (["--arena", "2MiB", "--granule", "3"], "multiple"),
        (["--arena", "2MiB", "--loaders", "0"], "greater than or equal to 1"),
        (["--arena", "2MiB", "--patience", "-1"], "greater than or equal to 0"),
    ],
)
def test_wrong_arguments_exit_with_2_and_say_what_is_accepted(
    arguments: list[str], accepted: str, tmp_path: Path
) -> None:
    status, _, messages = run("serve", tmp_path / "s", *arguments)
    assert (status, accepted in messages) == (2, True), messages
