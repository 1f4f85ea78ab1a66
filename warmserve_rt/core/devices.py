"""Devices by name: ``"host"``, ``"cuda"`` (the first) and ``"cuda:N"``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from warmserve_rt import _arguments as check
from warmserve_rt import _native
from warmserve_rt._errors import WarmServeError
from warmserve_rt.kernels import fatbin_path

DEFAULT_ARENA = 2 << 30
MOST_LOADERS = 1024


@dataclass(frozen=True)
class Granules:
    """A granule's bytes, and the largest share of a layer's granules that may stay unused."""

    nbytes: int
    max_padding: float


# The host maps a granule of 2 MiB in microseconds. A GPU takes as long to map one of 2 MiB as one
# of 16 MiB: with 2 MiB, mapping takes longer than copying (bench/switch.py).
HOST_GRANULES = Granules(2 << 20, 1.0)
CUDA_GRANULES = Granules(16 << 20, 0.05)

_NAME = re.compile(r"(host)|cuda(?::([0-9]+))?")


def checked_device(device: object) -> str:
    """Return the name of a device: "host", "cuda" or "cuda:N".

    Accepts upper case and torch's device objects. Raises ValueError or TypeError for anything else.
    """
    wanted = "'host', 'cuda' or 'cuda:N'"
    if hasattr(device, "type") and hasattr(device, "index"):  # torch.device
        index = device.index
        device = device.type if index is None else f"{device.type}:{index}"
    if not isinstance(device, str):
        raise TypeError(f"device must be {wanted}, got {check.shown(device)}")
    found = _NAME.fullmatch(device.strip().lower())
    if not found:
        hint = "; did you mean 'host'?" if device.strip().lower() == "cpu" else ""
        raise ValueError(f"no device {device!r}: device must be {wanted}{hint}")
    if found[2] and (len(found[2]) > 10 or int(found[2]) > check.INT32_MAX):
        raise ValueError(
            f"no device {check.shown(device)}: N must be an integer from 0 to {check.INT32_MAX}"
        )
    return found[0]


def open_driver(device: str, *, pump: bool, peers: Sequence[int] = ()) -> _native.Driver:
    """Open the driver of a device.

    Parameters
    ----------
    device : "host", "cuda" or "cuda:N"
    pump : bool
        Use no threads (host only).
    peers : sequence of int
        Ordinals of CUDA devices that may write this device's memory.

    Raises
    ------
    ValueError
        The name is invalid, no such device exists, or a peer cannot reach the device.
    WarmServeError
        The device cannot be used; the message says what to do.
    """
    name = checked_device(device)
    if name == "host":
        return _native.host_driver(threads=not pump)
    image = fatbin_path()
    try:
        return _native.cuda_driver(
            ordinal=int(name.partition(":")[2] or 0),
            kernels=image.read_bytes() if image else b"",
            peers=peers,
        )
    except (ValueError, WarmServeError) as error:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is None or "device" not in str(error):
            raise
        raise type(error)(f"{error} (CUDA_VISIBLE_DEVICES is {hidden!r})") from None


def usual_granules(*, cuda: bool) -> Granules:
    """Return the granules of a runtime whose caller names no other."""
    return CUDA_GRANULES if cuda else HOST_GRANULES


def loader_count(asked: int | None, *, pump: bool) -> int:
    """Return the number of loader threads, 0 with ``pump``. Raises ValueError or TypeError."""
    if asked is not None:
        asked = check.integer("loaders", asked, 0, MOST_LOADERS)
        if not asked and not pump:
            raise ValueError(
                f"loaders must be from 1 to {MOST_LOADERS}, got 0; for no threads set pump=True"
            )
    return 0 if pump else asked or max(1, min(8, len(os.sched_getaffinity(0)) - 1))


def arena_bytes(
    driver: _native.Driver, asked: int | None, headroom: int | None, granule: int, *, poison: bool
) -> int:
    """Return the bytes of the arena: ``asked`` if given; else, with a headroom, all free memory of
    the device except the headroom; else the default."""
    if asked is not None:
        return asked
    if headroom is None:
        return DEFAULT_ARENA
    available, _ = driver.memory()
    return max(0, available - headroom - granule * poison) // granule * granule
