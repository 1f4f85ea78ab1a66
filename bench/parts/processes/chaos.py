"""Random leases by clients, while clients and the broker are killed and stopped at random."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from warmserve_rt import Busy, Cancelled, Lease, Runtime, WarmServeError
from warmserve_rt.core.broker_connection import ANSWER_WITHIN_S, connect

from .kept_broker import FORKSERVER, KeptBroker

CLIENTS = 4
WRONG = 3  # exit status of a client that has read wrong bytes under a lease
REFUSED = (TimeoutError, Busy, Cancelled)
Words = Mapping[str, Sequence[tuple[bytes, bytes]]]  # the first and the last word of each layer


@dataclass
class Found:
    """Counts of a run: how often processes leased and died, and the faults that were seen."""

    leases: int = 0  # of clients that were not killed
    client_deaths: int = 0
    broker_deaths: int = 0
    wrong_bytes: int = 0  # clients that read some
    faults_under_lease: int = 0
    granules_lost: int = 0
    leases_lost: int = 0


def chaos(path: Path, models: Mapping[str, Path], granules: int, granule: int, s: float) -> Found:
    """Let clients lease for some seconds while processes die, and count what went wrong.

    Parameters
    ----------
    path : path
        Of the broker's socket.
    models : mapping of str to path
        Checkpoints by the models' names.
    granules, granule : int
        Of the arena: their number and their bytes.
    s : float
        Seconds.
    """
    found = Found()
    rng = random.Random(time.time_ns())
    words = _read_words(models, granules * granule)
    with KeptBroker(path, granules, granule) as broker:
        until = time.monotonic() + s
        clients = [_Client(path, models, words, rng, until) for _ in range(CLIENTS)]
        while time.monotonic() < until:
            time.sleep(rng.random() * 0.1)
            which, action = rng.randrange(CLIENTS), rng.random()
            if action < 0.4:
                broker.kill()
                found.broker_deaths += 1
            elif action < 0.8:
                clients[which].kill()
                found.client_deaths += 1
                _judge(clients[which], found)
                clients[which] = _Client(path, models, words, rng, until)
            else:
                with clients[which].stopped():
                    time.sleep(rng.random() * 3 if rng.random() < 0.1 else rng.random() * 0.2)
        for client in clients:
            found.leases += client.leases()
            _judge(client, found)
        _look_for_losses(path, found)
    return found


def _read_words(models: Mapping[str, Path], nbytes: int) -> Words:
    with Runtime("host", nbytes, tensors="numpy") as alone:
        for name, model in models.items():
            alone.register(name, model)
        words = {}
        for name in models:
            with alone.lease(name) as lease:
                words[name] = _words(lease)
    return words


def _words(lease: Lease) -> list[tuple[bytes, bytes]]:
    flat = [tensor.reshape(-1).view("u1") for tensor in lease.tensors.values()]
    return [(each[:8].tobytes(), each[-8:].tobytes()) for each in flat]


class _Client:
    def __init__(
        self, path: Path, models: Mapping[str, Path], words: Words, rng: random.Random, until: float
    ) -> None:
        self._leases, theirs = FORKSERVER.Pipe(duplex=False)
        arguments = (str(path), models, words, rng.randrange(2**32), until, theirs)
        self.process = FORKSERVER.Process(target=_lease_at_random, args=arguments, daemon=True)
        self.process.start()
        theirs.close()
        self.killed = False

    def kill(self) -> None:
        self.killed = self.process.is_alive()
        self.process.kill()
        self.process.join()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the process during the block."""
        pid = self.process.pid
        if pid is None or not self.process.is_alive():
            yield
            return
        os.kill(pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(pid, signal.SIGCONT)

    def leases(self) -> int:
        """Wait until the process has ended, and return the leases that it had."""
        try:
            counted = self._leases.recv() if self._leases.poll(60) else "it does not answer"
        except EOFError:  # it has ended by a fault, or after wrong bytes
            counted = 0
        if isinstance(counted, str):
            self.kill()
            raise RuntimeError(f"a client failed: {counted}")
        self.process.join()
        return int(counted)


def _judge(client: _Client, found: Found) -> None:
    code = client.process.exitcode
    found.wrong_bytes += code == WRONG
    found.faults_under_lease += code in (-signal.SIGSEGV, -signal.SIGBUS) and not client.killed


def _look_for_losses(path: Path, found: Found) -> None:
    """Count granules that no layer has and that are not free, and leases, after the clients."""
    for _ in range(100):
        state = connect(path, "bench").state(ANSWER_WITHIN_S)
        used = sum(model.bytes_resident for model in state.models) // state.granule_bytes
        found.granules_lost = state.granules - state.granules_free - used
        found.leases_lost = sum(model.leases for model in state.models)
        if not found.granules_lost and not found.leases_lost:
            return
        time.sleep(0.1)  # a process that has ended may not be noticed yet


def _lease_at_random(
    path: str, models: Mapping[str, Path], words: Words, seed: int, until: float, link: Connection
) -> None:
    os.chdir("/")
    rng = random.Random(seed)
    runtime = _connected(path, models)
    leases = 0
    while time.monotonic() < until:
        name = rng.choice(list(models))
        try:
            with runtime.lease(name, timeout=1) as lease:
                if _words(lease) != words[name]:
                    os._exit(WRONG)
                if rng.random() < 0.1:
                    time.sleep(rng.random() * 0.02)
            leases += 1
        except REFUSED:
            pass
        except WarmServeError as error:
            link.send(f"{type(error).__name__}: {error}")
            return
    link.send(leases)


def _connected(path: str, models: Mapping[str, Path]) -> Runtime:
    """Return a runtime that has registered the models, although brokers die meanwhile."""
    while True:
        try:
            runtime = Runtime("host", broker=path, broker_timeout=30, tensors="numpy")
            for name, model in models.items():
                runtime.register(name, model)
            return runtime
        except WarmServeError:
            time.sleep(0.01)
