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
from .runtime import BACKGROUND, FOREGROUND, Model, Runtime, Ticket
from .snapshot import LayerSnapshot, ModelSnapshot, Snapshot

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
    "Runtime",
    "Snapshot",
    "StagingTimeout",
    "StaleView",
    "Ticket",
    "WarmServeError",
]
