"""Costs of real devices, for the simulated driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PROFILES", "Profile"]


@dataclass(frozen=True)
class Profile:
    """The costs of a device's copies and calls, and of its host's memory.

    Parameters
    ----------
    options : mapping of str to value
        Options of :func:`simulated_cuda`, for those that the caller leaves out.
    costs : mapping of function to (float, float)
        The default of its ``costs``; costs that the caller gives replace those of their function.
    """

    options: Mapping[str, object] = field(default_factory=dict)
    costs: Mapping[str, tuple[float, float]] = field(default_factory=dict)


# An H200 with driver 580.159 in a virtual machine with 16 CPUs of a Xeon. "Measured" is by
# bench/gpu.sh; "chosen" so that loads and swaps of bench/switch.py take the measured time. Other
# figures are estimates.
_H200 = Profile(
    options={
        "clock": "concurrent",
        "h2d": 55e9,  # measured with copies of 256 MiB
        "d2h": 55e9,  # estimate: the same link
        "copy_start": 2.2e-6,  # measured: copies of 2 MiB reach 52 GB/s
        "launch": 2.5e-6,  # estimate
        "mapping_lock": True,  # NVIDIA's kernel modules 595.45 take one lock of the system
        # Measured: in a swap, a granule takes twice as long as alone. That copies are the cause is
        # chosen: loads with granules of 2 MiB are then as slow as measured, unlike with a factor 1.
        "mapping_beside_copies": 2.0,
        "read": 4.6e9,  # measured with four loaders: 4.3 to 4.75
        "dram": 148e9,  # chosen: 12 loaders then read as fast as measured, 3 GB/s each
    },
    costs={
        # Measured on calls for 1 to 256 granules of 2 to 32 MiB, by one thread.
        "cuMemCreate": (13.0, 0.05),
        "cuMemMap": (7.7, 0.0),
        "cuMemSetAccess": (24.0, 30.0),
        "cuMemUnmap": (12.0, 25.0),
        # Measured on 256 MiB: memory that was touched is registered at 26 GB/s, and memory is
        # allocated pinned at 2.2 GB/s. Microseconds for each 2 MiB.
        "cuMemHostRegister": (0.0, 80.7),
        "cuMemHostAlloc": (0.0, 953.0),
        # Estimates of enqueueing. A loader's call takes less than 1 % of the copy of its chunk.
        "cuMemcpyHtoDAsync": (3.0, 0.0),
        "cuMemcpyDtoHAsync": (3.0, 0.0),
        "cuMemcpyDtoDAsync": (3.0, 0.0),
        "cuLaunchKernel": (3.0, 0.0),
        "cuEventRecord": (1.0, 0.0),
        "cuEventQuery": (1.0, 0.0),
        "cuStreamWaitEvent": (1.0, 0.0),
    },
)

PROFILES: Mapping[str, Profile] = {"h200": _H200}
