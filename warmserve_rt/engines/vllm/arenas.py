"""The arenas of a process, shared by all its engines: one for each device and each broker."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

from warmserve_rt._errors import WarmServeError
from warmserve_rt.core.devices import usual_granules
from warmserve_rt.core.runtime import Runtime

from . import processes
from .broker_arena import BrokerArena
from .cache import Entry, layers_of
from .weights import Arena

log = logging.getLogger(__name__)
_arenas: dict[str | Path, Arena] = {}  # by the device, or by the socket of the broker
_owner = os.getpid()
_changes = threading.Lock()  # protects _arenas and _owner


def use(runtime: Runtime, device: str = "host") -> None:
    """Implement :func:`warmserve_rt.engines.vllm.use`."""
    if not isinstance(runtime, Runtime):
        raise TypeError(f"runtime must be a warmserve_rt.Runtime, got {runtime!r}")
    if not isinstance(device, str):
        raise TypeError(f"device must be 'host' or 'cuda:N', got {device!r}")
    made = Arena(runtime)
    if not made.is_open:
        raise WarmServeError("runtime must be open, got a closed runtime")
    with _changes:
        _forget_parents()
        if device in _arenas:
            raise ValueError(f"this process already has an arena on {device!r}")
        _arenas[device] = made
        processes.forget_strangers()
        processes.mark(device)
    if processes.starts_engines_elsewhere():
        log.warning(
            "use(runtime): vLLM starts engines in other processes, which cannot use a runtime of "
            "this process; set %s=0 before an engine starts",
            processes.SWITCH,
        )


def find(device: str | Path) -> Arena | None:
    """Return this process's open arena on a device or of a broker, or None."""
    with _changes:
        _forget_parents()
        return _arenas.get(device)


def attach(socket: Path) -> Arena:
    """Return the arena of the broker that listens at ``socket``; connect if this process has not.

    Raises WarmServeError if no broker listens there, and TimeoutError if it does not answer.
    """
    with _changes:
        _forget_parents()
        if socket not in _arenas:
            _arenas[socket] = BrokerArena(socket)
        return _arenas[socket]


def obtain(device: str, size: int | str | None, entry: Entry | None = None) -> Arena | None:
    """Return this process's arena on a device; make it if it does not exist.

    Parameters
    ----------
    device : "host" or "cuda:N"
        The device.
    size : int or str, optional
        The size of the arena: bytes, a size, or a share of the device's memory.
    entry : Entry, optional
        If ``size`` is None, a new arena is as large as this entry's weights.

    Returns
    -------
    Arena or None
        None if no arena exists and both ``size`` and ``entry`` are None.

    Raises
    ------
    ValueError
        The arena exists and has another size.
    WarmServeError
        The runtime for this device is in another process.
    Other
        Everything that :class:`Runtime` raises.
    """
    with _changes:
        _forget_parents()
        found = _arenas.get(device)
        if found is not None:
            if size is not None and not found.is_of(size):
                raise ValueError(
                    f"arena must be left out or be {found.nbytes}, the bytes of this process's "
                    f"arena on {device!r}, which all its engines share; got {size!r}"
                )
            return found
        processes.refuse_if_marked(device)
        if size is None and entry is None:
            return None
        wanted = size if size is not None else _needed(entry, device)
        _arenas[device] = Arena(Runtime(device, arena=wanted, tensors="torch"), wanted)
        return _arenas[device]


def _needed(entry: Entry | None, device: str) -> int:
    assert entry is not None
    granule = usual_granules(cuda=device != "host").nbytes
    return sum(-(-layer.nbytes // granule) * granule for layer in layers_of(entry.weights))


def _forget_parents() -> None:
    """Drop arenas that cannot be used: closed ones and, in a forked child, those of the parent.

    The caller holds ``_changes``.
    """
    global _owner
    if _owner != os.getpid():
        _owner = os.getpid()
        _arenas.clear()
    for device, arena in list(_arenas.items()):
        if not arena.is_open:
            del _arenas[device]
