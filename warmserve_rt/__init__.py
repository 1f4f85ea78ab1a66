"""Keep layers of many models warm in one device's memory and swap them in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from warmserve_rt.core.broker import Broker
from warmserve_rt.core.lease import Lease
from warmserve_rt.core.loading import BACKGROUND, FOREGROUND
from warmserve_rt.core.model import Model
from warmserve_rt.core.runtime import Runtime
from warmserve_rt.core.snapshot import LayerSnapshot, ModelSnapshot, Snapshot
from warmserve_rt.core.ticket import Progress, Ticket

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

__all__ = [
    "BACKGROUND",
    "FOREGROUND",
    "Broker",
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

# Imported on first access: the scheduler needs numba, a runtime does not. Not in ``__all__``, so
# that ``from warmserve_rt import *`` works without numba.
_LAZY = {
    "Forecaster": "warmserve_rt.policy.forecast",
    "RuntimeFleet": "warmserve_rt.scheduling.fleet",
    "Scheduler": "warmserve_rt.scheduling.scheduler",
    "profile_of": "warmserve_rt.scheduling.registered_models",
}

if TYPE_CHECKING:
    from warmserve_rt.policy.forecast import Forecaster as Forecaster
    from warmserve_rt.scheduling.fleet import RuntimeFleet as RuntimeFleet
    from warmserve_rt.scheduling.registered_models import profile_of as profile_of
    from warmserve_rt.scheduling.scheduler import Scheduler as Scheduler
else:  # a type checker would accept any name as an attribute of the module

    def __getattr__(name: str) -> object:
        """Import a name of `_LAZY`, or read ``__version__`` from the installed package."""
        if name in _LAZY:
            from importlib import import_module

            return getattr(import_module(_LAZY[name]), name)
        if name == "__version__":
            from importlib.metadata import version

            return version("warmserve_rt")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
