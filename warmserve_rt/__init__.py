"""Keeps layers of many models warm in one device's memory and swaps them in place."""

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
