"""A keeper and its broker, which the bench kills again and again."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

from warmserve_rt import Broker, Runtime
from warmserve_rt.core.keeper import fork_broker

FORKSERVER = multiprocessing.get_context("forkserver")  # starts a process in milliseconds
FORKSERVER.set_forkserver_preload(["numpy", "warmserve_rt"])


class KeptBroker:
    """A broker that is started again when it dies. A context manager: both end with the block.

    Parameters
    ----------
    path : path
        Of the broker's socket.
    granules, granule_bytes : int
        Of the arena.
    """

    def __init__(self, path: Path, granules: int, granule_bytes: int) -> None:
        self._pids, theirs = FORKSERVER.Pipe(duplex=False)
        arguments = (str(path), granules, granule_bytes, theirs)
        self._keeper = FORKSERVER.Process(target=_keep, args=arguments)
        self._keeper.start()
        theirs.close()
        self._pid = self._pids.recv()

    def kill(self) -> None:
        """Kill the broker. Returns when the next one serves."""
        os.kill(self._pid, signal.SIGKILL)
        self._pid = self._pids.recv()

    def __enter__(self) -> KeptBroker:
        return self

    def __exit__(self, *error: object) -> None:
        self._keeper.terminate()
        self._keeper.join()


def _keep(path: str, granules: int, granule_bytes: int, pids: Connection) -> None:
    os.chdir("/")
    kept = fork_broker(granules, granule_bytes, most_deaths=10**9, pause=0.0)
    runtime = Runtime(
        "host",
        kept.nbytes,
        granule=kept.granule_bytes,
        loaders=2,
        tensors="numpy",
        driver=kept.driver(),
    )
    with Broker(runtime, path, patience=0.05, kept=kept):
        pids.send(os.getpid())
        kept.wait()
