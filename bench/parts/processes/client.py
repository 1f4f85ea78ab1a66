"""A client of a broker in a process of its own, which carries out orders of the bench."""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from warmserve_rt import Runtime

SPAWN = multiprocessing.get_context("spawn")  # a fork would share the parent's runtime


class Client:
    """A client process. A context manager: the process ends with the block."""

    def __init__(self, path: Path) -> None:
        self._orders, theirs = SPAWN.Pipe()
        self._process = SPAWN.Process(target=_serve, args=(str(path), theirs), daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.join()

    def start(self, order: str, *arguments: object) -> None:
        """Give an order without waiting for its answer."""
        self._orders.send((order, arguments))

    def answer(self) -> Any:
        """Wait for the answer to the order that was given first, and return it. Raises what the
        order raised, and EOFError if the process has ended."""
        done, found = self._orders.recv()
        if not done:
            raise found
        return found

    def do(self, order: str, *arguments: object) -> Any:
        self.start(order, *arguments)
        return self.answer()

    def signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)


def _serve(path: str, orders: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = Worker(path)
    while True:
        try:
            order, arguments = orders.recv()
        except EOFError:
            return
        try:
            orders.send((True, getattr(worker, order)(*arguments)))
        except Exception as error:  # the bench raises it
            orders.send((False, error))


class Worker:
    """The orders, in the client's process."""

    def __init__(self, path: str) -> None:
        self._runtime = Runtime("host", broker=path, tensors="numpy")

    def register(self, name: str, checkpoint: str) -> None:
        self._runtime.register(name, checkpoint)

    def unregister(self, name: str) -> None:
        self._runtime.unregister(name)

    def lease(self, name: str) -> float:
        """Return the seconds from the request of a lease until all layers may be used."""
        began = time.perf_counter()
        lease = self._runtime.lease(name).acquire()
        taken = time.perf_counter() - began
        lease.release()
        return taken

    def time_guard(self, name: str, batches: int) -> tuple[float, float]:
        """Return the median seconds of an acquisition and a release of a guard on mapped layers: by
        two calls, and by a `with` block."""
        guard = self._runtime.guard(name)
        count = range(1000)

        def calls() -> None:
            for _ in count:
                guard.acquire()
                guard.release()

        def blocks() -> None:
            for _ in count:
                with guard:
                    pass

        def empty() -> None:
            for _ in count:
                pass

        def median(work: Callable[[], None]) -> float:
            samples = []
            for _ in range(batches):
                began = time.perf_counter()
                work()
                samples.append((time.perf_counter() - began) / len(count))
            return statistics.median(samples)

        calls()  # acquires the lease that the guard keeps
        loop = median(empty)
        return median(calls) - loop, median(blocks) - loop

    def compute(self, seconds: float) -> float:
        """Keep a processor busy with work that holds no lease."""
        until = time.perf_counter() + seconds
        found = np.arange(1 << 16, dtype=np.float64)
        while time.perf_counter() < until:
            found = np.sqrt(found + 1.0)
        return math.fsum(found)
