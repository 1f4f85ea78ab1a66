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
see its violations.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from warmserve_rt._units import parse_bytes

from ._simcuda_library import Control, Faults

__all__ = ["SimulatedCuda", "Violation", "simulated_cuda", "simulated_cuda_fixture"]

LIBRARY = Path(__file__).parent.with_name("libwarmserve_simcuda.so")
_open = threading.Lock()  # held while a simulated driver is open


@dataclass(frozen=True)
class Violation:
    """An operation that CUDA forbids or leaves undefined."""

    kind: str  # race, use-while-unmapped, uninitialised-read, leak, misuse
    message: str
    call: int  # the number of the offending driver call, counted from 1; 0: no call

    def __str__(self) -> str:
        return f"{self.kind} at call {self.call}: {self.message}"


class SimulatedCuda:
    """The simulated driver of this process; made by :func:`simulated_cuda`."""

    def __init__(self, library: Path, control: Control) -> None:
        self.library = library
        """A path with the name ``libcuda.so.1``, for code that opens the library by path."""
        self.faults = Faults(control)
        self._control = control

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a subprocess that opens ``libcuda.so.1`` itself."""
        folders = [str(self.library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, folders))}

    def report(self) -> dict[str, Any]:
        """Return violations, live, calls, seconds and copied (see csrc/simcuda/simcuda.h)."""
        text = self._control.report()
        try:
            report: dict[str, Any] = json.loads(ctypes.string_at(text))
        finally:
            self._control.free(text)
        return report

    @property
    def violations(self) -> list[Violation]:
        return [Violation(**found) for found in self.report()["violations"]]

    @property
    def live(self) -> dict[str, int]:
        """The number of existing objects, by kind."""
        return dict(self.report()["live"])

    @property
    def calls(self) -> dict[str, int]:
        """The number of calls of each called function, including injected failures."""
        return dict(self.report()["calls"])

    @property
    def copied(self) -> dict[str, int]:
        """Copied bytes by direction: h2d, d2h, d2d."""
        return dict(self.report()["copied"])

    @property
    def now(self) -> float:
        """Seconds on the driver's clock since it was reset."""
        return float(self._control.now())

    def peek(self, address: int, nbytes: int) -> bytes:
        """Return device memory as it is now, regardless of access rights and of pending work.

        Raises ValueError if the range is not mapped.
        """
        out = ctypes.create_string_buffer(nbytes)
        if self._control.peek(address, out, nbytes):
            raise ValueError(f"[{address:#x}, +{nbytes}) is not mapped")
        return out.raw

    def others_hold(self, nbytes: int | str) -> None:
        """Set the number of bytes of device 0 that other processes hold from now on."""
        self._control.others_hold(parse_bytes(nbytes, "nbytes"))

    def break_context(self, error: int) -> None:
        """Make the context of device 0 fail: all work returns this CUresult from now on."""
        self._control.break_context(error)

    def destroy_primary_context(self) -> None:
        """Destroy the primary context, like a library that resets a context it shares."""
        self._control.destroy_primary_context()

    def check(self, leaks: bool = True) -> None:
        """Raise AssertionError if there was a violation.

        With ``leaks``, also raise it if an object of the driver still exists. Each kind of leaked
        object is reported once.
        """
        if leaks:
            self._control.check_leaks()
        found = [each for each in self.violations if leaks or each.kind != "leak"]
        if found:
            lines = "\n".join(f"  {each}" for each in found)
            raise AssertionError(f"{len(found)} violations of CUDA's rules:\n{lines}")


def _options(given: Mapping[str, object], costs: Mapping[str, tuple[float, float]]) -> str:
    lines = [f"{key}={value}" for key, value in given.items() if value is not None]
    lines += [f"cost.{name}={call!r}+{granule!r}" for name, (call, granule) in costs.items()]
    return "".join(f"{line}\n" for line in lines)


@contextmanager
def simulated_cuda(
    *,
    devices: int = 1,
    peers: bool = False,
    memory: int | str = "8GiB",
    granularity: int | str = "2MiB",
    clock: Literal["real", "virtual"] = "real",
    h2d: float | None = None,
    d2h: float | None = None,
    d2d: float | None = None,
    launch: float = 0.0,
    costs: Mapping[str, tuple[float, float]] | None = None,
    content: int | None = None,
    driver_version: int = 13000,
    capability: int = 90,
    integrated: bool = False,
    host_numa: bool = False,
    visible: str | None = None,
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
    clock : "real" or "virtual"
        Virtual: no threads; time is counted and not waited for.
    h2d, d2h, d2d : float, optional
        Bytes per second of each device's copy engines. Default: as fast as possible.
    launch : float
        Minimum duration of a kernel in seconds.
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
    visible : str, optional
        As CUDA_VISIBLE_DEVICES. Default: the environment's.
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
    path = Path(library or LIBRARY).resolve()
    if not path.exists():
        raise ValueError(f"library must be a simulated driver, but {path} does not exist")
    options = _options(
        {
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
            "clock": clock,
            "h2d": h2d,
            "d2h": d2h,
            "d2d": d2d,
            "launch": launch,
            "content": content,
            "detector": int(detector),
        },
        costs or {},
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
