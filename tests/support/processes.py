"""Processes that run statements for a test: brokers and their clients."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from checkpoints import GRANULE, content

from warmserve_rt import _native
from warmserve_rt.core.broker_connection import connect

# A server forks the processes, so that each starts in milliseconds. It has no threads.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["numpy", "warmserve_rt"])

SIZES = (GRANULE, GRANULE // 2, 2 * GRANULE)  # of a model's layers: 4 granules, 8 MiB


def expected(model: str, sizes: Sequence[int] = SIZES) -> list[bytes]:
    """Return the bytes of a model's tensors, which is one for each layer."""
    return [content(model, i, size) for i, size in enumerate(sizes)]


# Defined in each process before its runtime is made.
_HELPERS = """
import ctypes, os, signal, socket, threading, time
import warmserve_rt
from warmserve_rt import *

def parts(model, layers=None):
    'Return the bytes of the tensors of a model that is leased.'
    views = list(runtime.tensors(model).values())
    return [views[i].tobytes() for i in (range(len(views)) if layers is None else layers)]

def weights(model, layers=None, **options):
    'Lease a model, or layers of it, and return the bytes of the tensors.'
    with runtime.lease(model, layers=layers, **options):
        return parts(model, layers)

def mapped(model):
    'Return the layers that are resident in this process.'
    layers = runtime.snapshot().models[model].layers
    return [i for i, layer in enumerate(layers) if layer.residency == 'resident']
"""


class Process:
    """A process that runs the statements it is sent, one string after the other."""

    def __init__(self, code: str, **names: object) -> None:
        self._pipe, theirs = _context.Pipe()
        with _outside_of_the_sources():
            self._process = _context.Process(target=_child, args=(theirs,), daemon=True)
            self._process.start()
        theirs.close()
        self.pid: int = self._process.pid  # type: ignore[assignment]
        self.begin(_HELPERS + code, **names)

    def begin(self, code: str, **names: object) -> None:
        """Let the process run statements, with values for names in them. Does not wait."""
        self._pipe.send((code, names))

    def result(self, within: float = 30) -> Any:
        """Return the value of the expression that was begun, or raise its exception."""
        assert self._pipe.poll(within), f"no answer from process {self.pid}"
        raised, value = self._pipe.recv()
        if raised:
            raise value
        return value

    def answered(self, within: float = 0) -> bool:
        """Return whether the process has run what was begun."""
        return self._pipe.poll(within)

    def run(self, code: str, **names: object) -> Any:
        """Run statements; return the value if they are one expression."""
        self.begin(code, **names)
        return self.result()

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self) -> None:
        """Stop the process. Returns when all its threads have stopped."""
        self.signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.pid}/task")
        wait_until(
            lambda: all(
                (task / "stat").read_text().rpartition(")")[2].split()[0] in "TZ"
                for task in tasks.iterdir()
            )
        )

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kill the process. Returns when it has ended."""
        self._process.kill()
        self._process.join()

    def exitcode(self, within: float = 10) -> int | None:
        """Return the exit status, or the negative number of the signal that ended the process."""
        self._process.join(within)
        return self._process.exitcode

    def end(self) -> None:
        self.kill()
        self._process.close()
        self._pipe.close()


class KeptBroker(Process):
    """A keeper, whose broker runs the statements. `pid` and `kill()` are of the keeper."""

    def broker_pid(self) -> int:
        return int(self.run("os.getpid()"))

    def kill_broker(self) -> None:
        """Kill the broker. Returns when the next one serves."""
        os.kill(self.broker_pid(), signal.SIGKILL)
        self.result()


class Processes:
    """A broker and its clients, which end with the test.

    Parameters
    ----------
    path : path
        Of the broker's socket.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._all: list[Process] = []

    def process(self, code: str = "", **names: object) -> Process:
        made = Process(code, path=self.path, **names)
        self._all.append(made)
        made.result()
        return made

    def broker(self, mib: int, *, patience: float = 0.1, **options: object) -> Process:
        """Start a broker with an arena of `mib` MiB: ``runtime`` and ``broker`` in its process."""
        options = {"arena": mib << 20, "loaders": 2, **options}
        return self.process(
            "runtime = Runtime('host', tensors='numpy', **options)\n"
            "broker = Broker(runtime, path, patience=patience)",
            options=options,
            patience=patience,
        )

    def kept_broker(self, mib: int, *, patience: float = 0.1, **options: object) -> KeptBroker:
        """Start a keeper and its broker. ``runtime`` in the latter is on the driver ``faulty``."""
        made = KeptBroker(
            "import logging\n"
            "logging.basicConfig()  # a broker that dies by itself is reported\n"
            "from warmserve_rt.core.keeper import fork_broker\n"
            "kept = fork_broker(granules, granule, most_deaths=10**6, pause=0)\n"
            "threading.Thread(target=lambda: (kept.wait(), os._exit(0)), daemon=True).start()\n"
            "faulty = warmserve_rt._native.FaultyDriver(kept.driver())\n"
            "runtime = Runtime('host', kept.nbytes, granule=granule, tensors='numpy',\n"
            "                  driver=faulty, **options)\n"
            "broker = Broker(runtime, path, patience=patience, kept=kept)",
            path=self.path,
            granules=(mib << 20) // GRANULE,
            granule=GRANULE,
            options={"loaders": 2, **options},
            patience=patience,
        )
        self._all.append(made)
        made.result()
        return made

    def client(self, name: str = "client", **models: Path) -> Process:
        """Start a client that registers models: ``runtime`` in its process."""
        return self.process(
            "runtime = Runtime('host', broker=path, name=name, tensors='numpy')\n"
            "for each in models: runtime.register(each, models[each])",
            name=name,
            models=models,
        )

    def state(self) -> _native.BrokerState:
        """Return what the broker tells about itself."""
        return connect(self.path, "test").state(10)

    def client_state(self, process: Process) -> _native.ClientState | None:
        """Return what the broker tells about a client, or None if it does not know it."""
        return next((each for each in self.state().clients if each.pid == process.pid), None)

    def end(self) -> None:
        for process in reversed(self._all):
            process.end()


def wait_until(done: Callable[[], object], within: float = 10) -> float:
    """Wait until `done()` is true, and return the seconds that it took."""
    begin = time.monotonic()
    while not done():
        assert time.monotonic() - begin < within, "it did not happen in time"
        time.sleep(0.005)
    return time.monotonic() - begin


@contextmanager
def _outside_of_the_sources() -> Iterator[None]:
    """Change the folder to ``/``: a process would import the package from the current folder."""
    before = Path.cwd()
    os.chdir("/")
    try:
        yield
    finally:
        os.chdir(before)


def _child(pipe: Connection) -> None:
    os.chdir("/")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some tests make it fault
    names: dict[str, Any] = {}
    with contextlib.suppress(EOFError):
        while True:
            code, given = pipe.recv()
            names.update(given)
            try:
                pipe.send((False, _run(code, names)))
            except Exception as error:
                pipe.send((True, error))


def _run(code: str, names: dict[str, Any]) -> Any:
    try:
        expression = compile(code, "<test>", "eval")
    except SyntaxError:
        exec(compile(code, "<test>", "exec"), names)
        return None
    return eval(expression, names)
