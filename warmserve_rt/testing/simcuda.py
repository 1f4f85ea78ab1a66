"""A simulated CUDA driver, for tests of this library and of other code that uses ``libcuda``.

It replaces ``libcuda.so.1``: address reservations, granules, mappings, streams, events and copies
behave as CUDA's do, only more strictly. A copy reads pinned memory when it runs, not when it is
enqueued. The CPU cannot dereference any device address. Two unordered accesses are reported as a
race regardless of their timing. In a user's own CI, without a GPU:

    from warmserve_rt.testing import simulated_cuda

    def test_my_engine():
        with simulated_cuda(memory="1GiB", leaks=True) as cuda:  # raises for what CUDA forbids
            subprocess.run([sys.executable, "engine.py"], env=cuda.environment, check=True)
            run_my_engine(libcuda=cuda.library)  # or in this process, if it takes a path

In ``conftest.py``, as a fixture: ``cuda = simulated_cuda_fixture(memory="1GiB")``. Each process has
one simulated driver. A subprocess has its own driver with the same options; this process does not
see its violations. Processes can export allocations and import those of others.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from warmserve_rt._units import parse_bytes

from ._simcuda_library import Control, SimulatedCuda, Violation
from .profiles import PROFILES, Profile

__all__ = ["SimulatedCuda", "Violation", "simulated_cuda", "simulated_cuda_fixture"]

LIBRARY = Path(__file__).parent.with_name("libwarmserve_simcuda.so")
_open = threading.Lock()  # held while a simulated driver is open


def _options(given: Mapping[str, object], costs: Mapping[str, tuple[float, float]]) -> str:
    lines = [
        f"{key}={int(value) if isinstance(value, bool) else value}"
        for key, value in given.items()
        if value is not None
    ]
    lines += [f"cost.{name}={call!r}+{granule!r}" for name, (call, granule) in costs.items()]
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def simulated_cuda(
    *,
    devices: int = 1,
    peers: bool = False,
    memory: int | str = "8GiB",
    granularity: int | str = "2MiB",
    profile: Literal["h200"] | None = None,
    clock: Literal["real", "virtual", "concurrent"] | None = None,
    h2d: float | None = None,
    d2h: float | None = None,
    d2d: float | None = None,
    copy_start: float | None = None,
    launch: float | None = None,
    read: float | None = None,
    dram: float | None = None,
    mapping_lock: bool | None = None,
    mapping_beside_copies: float | None = None,
    context_lock: bool | None = None,
    costs: Mapping[str, tuple[float, float]] | None = None,
    content: int | None = None,
    driver_version: int = 13000,
    capability: int = 90,
    integrated: bool = False,
    host_numa: bool = False,
    numa_node: int = 0,
    visible: str | None = None,
    machine: Path | str | None = None,
    name: str = "Simulated CUDA",
    detector: bool = True,
    check: bool = True,
    leaks: bool = False,
    library: Path | str | None = None,
) -> Iterator[SimulatedCuda]:
    """Open a new simulated driver, without objects and not initialised.

    Parameters
    ----------
    devices : int
        Number of devices, all alike.
    peers : bool
        Any two devices can access each other's memory once access is set.
    memory, granularity : int or str
        Bytes of each device, and its granularity.
    profile : "h200", optional
        Take costs that were measured on this device for ``clock`` to ``costs``, as far as these are
        not given. See ``docs/testing.md``. Default: every cost is zero.
    clock : "real", "virtual" or "concurrent", optional
        Virtual: streams have no threads; time is counted and not waited for, and the costs of all
        threads add up. Concurrent: the same, but the costs of several threads overlap, and time
        advances only while every thread of the process sleeps. Default: the profile's, or real.
    h2d, d2h, d2d : float, optional
        Bytes per second of each device's copy engines. Default: as fast as possible.
    copy_start : float, optional
        Seconds that a copy engine takes for each copy besides its bytes. Only for engines with a
        speed.
    launch : float, optional
        Minimum duration of a kernel in seconds.
    read, dram : float, optional
        Bytes per second that a thread reads out of the page cache, and of the host's memory, which
        reads and copies share. Concurrent clock only. Default: no limit.
    mapping_lock : bool, optional
        Map, set-access and unmap calls of all threads take turns, mapping by mapping.
    mapping_beside_copies : float, optional
        Factor of these calls' costs while a copy from the host is moving. Default: 1.
    context_lock : bool, optional
        These calls also hold a lock that launches, queries and copies take for their own cost.
        :meth:`SimulatedCuda.report` counts waits for both locks as ``lock_waits``.
    costs : mapping of function to (float, float), optional
        Microseconds that a function takes for each call and for each granule it concerns, as in
        ``{"cuMemSetAccess": (24.0, 30.0)}``. For cuMemSetAccess and cuMemUnmap the second number is
        for each mapping, of any size.
    content : int, optional
        Keep only this many leading bytes of each granule; the rest reads as zeros. Cannot be
        combined with ``integrated`` or ``host_numa``. Default: keep all bytes.
    driver_version, capability, name
        What the driver reports; ``capability`` is the compute capability times ten.
    integrated : bool
        The device has no memory but the host's. Implies ``host_numa``.
    host_numa : bool
        The CPU can be given access to host memory that is mapped for the device.
    numa_node : int
        The host's NUMA node next to each device; -1 if the host has no nodes.
    visible : str, optional
        As CUDA_VISIBLE_DEVICES. Default: the environment's.
    machine : Path or str, optional
        A file that all processes of one simulated machine share, which is made if there is none.
        The free memory then counts what each process holds, and memory that several processes hold
        once. All of them need the same devices. Default: this process is alone.
    detector : bool
        Look for races and for memory that is released while in use.
    check : bool
        Raise AssertionError for violations on a clean exit.
    leaks : bool
        Also raise it for objects that still exist.
    library : Path or str, optional
        Another build of the simulator.

    Raises
    ------
    ValueError
        A simulated driver is already open, an option is invalid, or the library is missing.
    AssertionError
        On exit, as described at ``check`` and ``leaks``.

    Notes
    -----
    Objects that are not released before the end of the ``with`` are destroyed: do not use them.
    """
    if profile is not None and profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    path = Path(library or LIBRARY).resolve()
    if not path.exists():
        raise ValueError(f"library must be a simulated driver, but {path} does not exist")
    costs_of = PROFILES[profile] if profile else Profile()
    paced = {
        "clock": clock,
        "h2d": h2d,
        "d2h": d2h,
        "d2d": d2d,
        "copy_start": copy_start,
        "launch": launch,
        "read": read,
        "dram": dram,
        "mapping_lock": mapping_lock,
        "mapping_beside_copies": mapping_beside_copies,
        "context_lock": context_lock,
    }
    options = _options(
        {
            **costs_of.options,
            **{key: value for key, value in paced.items() if value is not None},
            "devices": devices,
            "peers": int(peers),
            "visible": os.environ.get("CUDA_VISIBLE_DEVICES") if visible is None else visible,
            "name": name,
            "driver_version": driver_version,
            "capability": capability,
            "memory": parse_bytes(memory, "memory"),
            "granularity": parse_bytes(granularity, "granularity"),
            "integrated": int(integrated),
            "host_numa": int(host_numa),
            "numa_node": numa_node,
            "content": content,
            "machine": None if machine is None else Path(machine).resolve(),
            "detector": int(detector),
        },
        {**costs_of.costs, **(costs or {})},
    )
    if not _open.acquire(blocking=False):
        raise ValueError("a simulated driver is already open: a process can have only one")
    try:
        with tempfile.TemporaryDirectory(prefix="warmserve-simcuda-") as made:
            folder = Path(made)
            link = folder / "libcuda.so.1"
            link.symlink_to(path)
            (folder / "simcuda.conf").write_text(options)
            control = Control(path)
            if control.reset(options.encode()):
                raise ValueError(control.error().decode())
            cuda = SimulatedCuda(link, control)
            yield cuda
            if check or leaks:
                cuda.check(leaks=leaks)
            control.reset(None)  # not after an exception: threads may still be in calls
    finally:
        _open.release()


def simulated_cuda_fixture(**options: Any) -> Any:
    """Return a pytest fixture that opens a :func:`simulated_cuda` with these options per test."""
    import pytest

    @pytest.fixture
    def cuda() -> Iterator[SimulatedCuda]:
        with simulated_cuda(**options) as made:
            yield made

    return cuda
