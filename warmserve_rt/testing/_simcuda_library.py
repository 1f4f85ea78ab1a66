"""The simulated driver of this process: control functions, injected faults, and observations."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from warmserve_rt._units import parse_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

_STATUSES = {"failed": 999, "out_of_memory": 2, "device_lost": 700}
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
    "host_read": (None, [_u64]),
    "sleep": (None, [_u64]),
    "now": (ctypes.c_double, []),
    "peek": (ctypes.c_int, [_u64, ctypes.c_void_p, _u64]),
    "report": (ctypes.c_void_p, []),
    "free": (None, [ctypes.c_void_p]),
    "check_leaks": (None, []),
}


class Control:
    """The typed control functions of the library."""

    def __init__(self, path: Path) -> None:
        self.library = library = ctypes.CDLL(str(path))
        for name, (result, parameters) in _FUNCTIONS.items():
            function = getattr(library, f"simcuda_{name}")
            function.restype, function.argtypes = result, parameters
            setattr(self, name, function)

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...


class Faults:
    """Makes driver functions fail, by their exported names; same interface as ``FaultyDriver``.

    A failed call does nothing else. An error that no context survives, however, destroys all
    contexts.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._only: bytes | None = None

    def arm(
        self,
        ranges: Sequence[tuple[int, int | None]],
        *,
        only: str | None = None,
        status: str | int = "failed",
    ) -> None:
        """Make calls fail from now on. Replaces earlier faults.

        Parameters
        ----------
        ranges : sequence of (first, last)
            Numbers of the calls that fail, counted from 1 from now on. A last of None: without end.
        only : str, optional
            Count and fail only calls of this function.
        status : "failed", "out_of_memory", "device_lost" or int
            The error that a failed call returns; an int is a CUresult.

        Raises
        ------
        ValueError
            The status or the function is unknown.
        """
        error = status if isinstance(status, int) else _STATUSES.get(status)
        if error is None:
            raise ValueError(
                f"status must be one of {', '.join(_STATUSES)} or a CUresult, got {status!r}"
            )
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
        """The number of counted calls since :meth:`arm`."""
        return int(self._control.calls(self._only))

    @property
    def injected(self) -> int:
        return int(self._control.injected())

    @property
    def last(self) -> str:
        """The function that failed last, or an empty string."""
        return str(self._control.last_fault().decode())


@dataclass(frozen=True)
class Violation:
    """An operation that CUDA forbids or leaves undefined."""

    kind: str  # race, use-while-unmapped, uninitialised-read, leak, misuse
    message: str
    call: int  # the number of the offending driver call, counted from 1; 0: no call

    def __str__(self) -> str:
        return f"{self.kind} at call {self.call}: {self.message}"


class SimulatedCuda:
    """The simulated driver of this process; made by ``simulated_cuda``."""

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
        """Return violations, live, calls, seconds, copied and lock_waits (see simcuda.h)."""
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

    def host_read(self, nbytes: int) -> None:
        """Take the time in which this thread reads so much of a file, on the concurrent clock."""
        self._control.host_read(nbytes)

    def sleep(self, seconds: float) -> None:
        """Sleep, on the concurrent clock in its time, and for the thread's timer slack longer."""
        self._control.sleep(round(seconds * 1e9))

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
