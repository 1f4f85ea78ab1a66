"""A broker: one process that owns a device's memory, from which others lease.

    warmserve-rt memory serve PATH --arena 8GiB       # the broker
    Runtime("host", broker=PATH)                      # in each process that uses it

Any number of processes register, prewarm and lease models over one broker, and swap in place of
each other. A model that one of them has loaded is resident for all, and stays so when they end.
"""

from __future__ import annotations

import os
from importlib.metadata import version

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._log import log

from .broker_connection import prepared
from .keeper import Kept
from .runtime import Runtime


class Broker:
    """Serves the arena of a runtime to other processes of this user.

    A context manager: it stops serving at the end of the block.

    Parameters
    ----------
    runtime : Runtime
        On the host, with threads, and not itself the client of a broker. It must not be trimmed
        while it is served. The caller closes it after the broker.
    path : path
        Of the socket to listen at. Its folder is made if it does not exist. It must belong to this
        user, with mode 0700.
    patience : float
        Seconds that an eviction waits for a client to give a layer up. Afterwards the layer counts
        as leased by the client, and other layers are evicted.
    kept : Kept, optional
        The descriptors of this broker's keeper (``warmserve_rt.core.keeper``), which also holds the
        runtime's memory. Default: no keeper, so nothing outlives this process.

    Raises
    ------
    WarmServeError
        Another broker listens at the path, or the path cannot be used.
    ValueError
        The runtime's memory cannot be shared.

    Notes
    -----
    A client's lease on layers that it has mapped sends no message. When the broker needs such
    layers, it asks the client, which unmaps them as soon as no lease holds them. A granule is given
    to another layer only after all processes that could read it have unmapped it or have ended. So
    a read outside of a lease faults, and never sees another model's bytes.

    Thread-safe.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: str | os.PathLike[str],
        *,
        patience: float = 0.1,
        kept: Kept | None = None,
    ) -> None:
        self.path = prepared(path)
        self._runtime = runtime  # kept alive
        self._native = _native.BrokerServer(
            runtime.native,
            path=os.fspath(self.path),
            version=version("warmserve_rt"),
            patience=min(check.seconds("patience", patience), 1e6),
            keeper=kept.keeper.fileno() if kept else -1,
            former_clients=kept.clients if kept else (),
        )
        if kept:
            kept.serving()
        log.info("serving an arena at %s", self.path)

    def close(self) -> None:
        """Stop serving and end all connections. Clients keep what they have mapped. Idempotent."""
        self._native.stop()

    def __enter__(self) -> Broker:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
