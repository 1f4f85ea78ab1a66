"""A simulated CUDA driver, for tests of this library and of whatever else talks to ``libcuda``.

It stands in for ``libcuda.so.1``: address reservations, granules, mappings, streams, events and
copies behave as CUDA's do, only more strictly. A copy reads pinned memory when it runs and not when
it is enqueued, no address of the device can be dereferenced by the CPU, and two accesses that
nothing orders are reported as a race however the timing fell. In a user's own CI, without a GPU:

    from warmserve_rt.testing import simulated_cuda

    def test_my_engine():
        with simulated_cuda(memory="1GiB", leaks=True) as cuda:  # raises for what CUDA forbids
            subprocess.run([sys.executable, "engine.py"], env=cuda.environment, check=True)
            run_my_engine(libcuda=cuda.library)  # or in this process, if it takes a path

In ``conftest.py``, as a fixture: ``cuda = simulated_cuda_fixture(memory="1GiB")``. There is one
driver a process; a subprocess has its own, of the same options, which this one does not see.
"""

from __future__ import annotations

import ctypes
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from warmserve_rt._units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["SimulatedCuda", "Violation", "simulated_cuda", "simulated_cuda_fixture"]

LIBRARY = Path(__file__).parent.with_name("libwarmserve_simcuda.so")
_STATUSES = {"failed": 999, "out_of_memory": 2, "device_lost": 700}
_open = threading.Lock()  # held while one is

_u64, _text = ctypes.c_ulonglong, ctypes.c_char_p
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "reset": (ctypes.c_int, [_text]),
    "error": (_text, []),
    "clear_faults": (None, []),
    "fault": (ctypes.c_int, [_text, _u64, _u64, ctypes.c_int]),
    "calls": (_u64, [_text]),
    "injected": (_u64, []),
    "last_fault": (_text, []),
    "others_hold": (None, [_u64]),
    "break_context": (None, [ctypes.c_int]),
    "destroy_primary_context": (None, []),
    "now": (ctypes.c_double, []),
    "peek": (ctypes.c_int, [_u64, ctypes.c_void_p, _u64]),
    "report": (ctypes.c_void_p, []),
    "free": (None, [ctypes.c_void_p]),
    "check_leaks": (None, []),
}


@dataclass(frozen=True)
class Violation:
    """Something that CUDA forbids, or leaves undefined, was done."""

    kind: str  # race, use-while-unmapped, uninitialised-read, leak, misuse
    message: str
    call: int  # the number of the offending call of the driver, from 1; 0: no call

    def __str__(self) -> str:
        return f"{self.kind} at call {self.call}: {self.message}"


class _Control:
    """The control functions of the library, typed."""

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        for name, (result, parameters) in _FUNCTIONS.items():
            function = getattr(library, f"simcuda_{name}")
            function.restype, function.argtypes = result, parameters
            setattr(self, name, function)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


class Faults:
    """Makes calls fail: the interface of the native ``FaultyDriver``, for the driver's functions
    by their exported names. What is failed has done nothing else; but an error that no context
    survives is one that all have died of."""

    def __init__(self, control: _Control) -> None:
        self._control = control
        self._only: bytes | None = None

    def arm(
        self,
        ranges: Sequence[tuple[int, int | None]],
        *,
        only: str | None = None,
        status: str | int = "failed",
    ) -> None:
        """Fails the calls in these ranges, counted from 1 from now on; an end of None is never.
        ``only`` counts and fails the calls of one function. ``status`` is ``failed``,
        ``out_of_memory``, ``device_lost`` or a CUresult."""
        error = status if isinstance(status, int) else _STATUSES.get(status)
        if error is None:
            raise ValueError(f"no status {status!r}: one of {', '.join(_STATUSES)}, or a number")
        self._control.clear_faults()
        self._only = only.encode() if only else None
        for first, last in ranges:
            end = (1 << 64) - 1 if last is None else last
            if self._control.fault(self._only, first, end, error):
                raise ValueError(self._control.error().decode())

    def disarm(self) -> None:
        self.arm([])

    @property
    def calls(self) -> int:
        """Since :meth:`arm`, of what it counts."""
        return int(self._control.calls(self._only))

    @property
    def injected(self) -> int:
        return int(self._control.injected())

    @property
    def last(self) -> str:
        """The function that was failed last, or an empty string."""
        return str(self._control.last_fault().decode())


class SimulatedCuda:
    """The simulated driver of this process; made by :func:`simulated_cuda`."""

    def __init__(self, library: Path, control: _Control) -> None:
        self.library = library
        """A path whose name is ``libcuda.so.1``, for those who open one."""
        self.faults = Faults(control)
        self._control = control

    @property
    def environment(self) -> dict[str, str]:
        """For a subprocess that opens ``libcuda.so.1`` by itself."""
        folders = [str(self.library.parent), os.environ.get("LD_LIBRARY_PATH", "")]
        return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, folders))}

    def report(self) -> dict[str, Any]:
        """All that was seen: violations, live, calls, seconds, copied (csrc/simcuda/simcuda.h)."""
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
        """Objects that are there, by kind."""
        return dict(self.report()["live"])

    @property
    def calls(self) -> dict[str, int]:
        """Calls of each function that was called, those failed on purpose too."""
        return dict(self.report()["calls"])

    @property
    def copied(self) -> dict[str, int]:
        """Bytes, by direction: h2d, d2h, d2d."""
        return dict(self.report()["copied"])

    @property
    def now(self) -> float:
        """Seconds on its clock since it began."""
        return float(self._control.now())

    def peek(self, address: int, nbytes: int) -> bytes:
        """Device memory as it is now, whatever access is set and whatever is still to run."""
        out = ctypes.create_string_buffer(nbytes)
        if self._control.peek(address, out, nbytes):
            raise ValueError(f"nothing is mapped in [{address:#x}, +{nbytes})")
        return out.raw

    def others_hold(self, nbytes: int | str) -> None:
        """So many bytes of device 0 are other processes', from now on."""
        self._control.others_hold(parse_bytes(nbytes, "nbytes"))

    def break_context(self, error: int) -> None:
        """The context of device 0 has died of this CUresult: work returns it from now on."""
        self._control.break_context(error)

    def destroy_primary_context(self) -> None:
        """As by a library that resets a context it shares with others."""
        self._control.destroy_primary_context()

    def check(self, leaks: bool = True) -> None:
        """Raises AssertionError if there was a violation; with ``leaks``, also if an object of the
        driver is still there. Leaks are told once."""
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
    """Begins the simulated driver anew, without objects and not initialised.

    With ``peers`` every two devices reach each other's memory, once access is set.
    ``h2d``, ``d2h`` and ``d2d`` are bytes per second of each device's copy engines and ``launch``
    seconds for a kernel, at least; none: as fast as it goes. ``costs`` are microseconds that a
    function takes, for each call and for each granule it concerns, which for cuMemSetAccess and
    cuMemUnmap is each mapping, however large: ``{"cuMemSetAccess": (24.0, 30.0)}``. With
    ``clock="virtual"`` there are no threads and time is counted, not waited for.
    ``content`` keeps only so many leading bytes of each granule; what is not kept reads as zeros.
    With ``host_numa`` the CPU can be given access to memory of the host that is mapped for the
    device; with ``integrated`` too, where there is no other. Neither goes with ``content``.
    ``visible`` is as CUDA_VISIBLE_DEVICES, and the environment's where it is None. ``library`` is
    another build of the simulator.

    On a clean exit violations raise AssertionError, unless ``check=False``; objects that are still
    there do only with ``leaks=True``. Objects that outlive the ``with`` are gone: do not use them.
    One can be open at a time; ValueError for a second one, and for options that make no sense.
    """
    path = Path(library or LIBRARY).resolve()
    if not path.exists():
        raise ValueError(f"there is no simulated driver at {path}")
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
        raise ValueError("a simulated driver is open already: there is one a process")
    try:
        with tempfile.TemporaryDirectory(prefix="warmserve-simcuda-") as made:
            folder = Path(made)
            link = folder / "libcuda.so.1"
            link.symlink_to(path)
            (folder / "simcuda.conf").write_text(options)
            control = _Control(path)
            if control.reset(options.encode()):
                raise ValueError(control.error().decode())
            cuda = SimulatedCuda(link, control)
            yield cuda
            if check or leaks:
                cuda.check(leaks=leaks)
            control.reset(None)  # not after an exception: threads may be in calls yet
    finally:
        _open.release()


def simulated_cuda_fixture(**options: Any) -> Any:
    """A pytest fixture that gives each test a :func:`simulated_cuda` with these options."""
    import pytest

    @pytest.fixture
    def cuda() -> Iterator[SimulatedCuda]:
        with simulated_cuda(**options) as made:
            yield made

    return cuda
