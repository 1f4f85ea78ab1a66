"""Keeps layers of many models warm in one device's memory and swaps them in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._errors import (
    Busy,
    Cancelled,
    CorruptCheckpoint,
    DeviceLost,
    OutOfDeviceMemory,
    StagingTimeout,
    StaleView,
    WarmServeError,
)
from .lease import Lease
from .model import Model
from .runtime import BACKGROUND, FOREGROUND, Runtime
from .snapshot import LayerSnapshot, ModelSnapshot, Snapshot
from .ticket import Progress, Ticket

__all__ = [
    "BACKGROUND",
    "FOREGROUND",
    "Busy",
    "Cancelled",
    "CorruptCheckpoint",
    "DeviceLost",
    "LayerSnapshot",
    "Lease",
    "Model",
    "ModelSnapshot",
    "OutOfDeviceMemory",
    "Progress",
    "Runtime",
    "Snapshot",
    "StagingTimeout",
    "StaleView",
    "Ticket",
    "WarmServeError",
]

__version__: str

if not TYPE_CHECKING:  # a checker would take every name for one of the module's

    def __getattr__(name: str) -> str:
        """Reads ``__version__`` from the installed package when it is asked for."""
        if name == "__version__":
            from importlib.metadata import version

            return version("warmserve_rt")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
