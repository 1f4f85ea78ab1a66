"""Costs of real devices, for the simulated driver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["PROFILES", "Profile"]


@dataclass(frozen=True)
class Profile:
    """What a device's copies, calls and host memory cost.

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
        # Chosen: without it, loads with granules of 2 MiB are 14 % faster than measured, and those
        # with 16 MiB are not. No GPU was asked for it alone.
        "mapping_beside_copies": 1.4,
        "read": 4.7e9,  # measured with four loaders: 4.3 to 4.75
        "dram": 154e9,  # chosen: 12 loaders read 3 GB/s each, and their copies take 36 GB/s
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
