"""The control functions of the simulated driver's library, and the faults that they inject."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
