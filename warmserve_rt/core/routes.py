"""The devices of a runtime: its own, and neighbours whose host links its loads may use.

Each chunk of a load takes the link that would finish it first, at the speed last measured for each
link. Slow or busy links therefore get few chunks. A chunk that takes a neighbour's link is copied
to a small buffer in the neighbour's memory, and from there peer to peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt import _native

from .devices import checked_device, open_driver

Path: TypeAlias = str | _native.Driver


def open_devices(
    device: str, own: _native.Driver | None, paths: Sequence[Path], *, pump: bool
) -> tuple[_native.Driver, list[_native.Driver]]:
    """Return the driver of the device and the drivers of its neighbours.

    Parameters
    ----------
    device : str
    own : native driver or None
        The device's driver. Default: opened here.
    paths : sequence of "cuda:N" or native drivers
        The neighbours. If they are drivers, ``own`` must have been opened with them as ``peers``.
    pump : bool
        As for :func:`devices.open_driver`.

    Raises
    ------
    ValueError
        A path is not "cuda:N", is the device itself, is named twice, or cannot reach the device's
        memory.

    Other errors are those of :func:`devices.open_driver`.
    """
    neighbours: list[_native.Driver] = []
    ordinals: list[int] = []
    for path in check.sequence("paths", paths, "'cuda:N'"):
        if isinstance(path, _native.Driver):
            neighbours.append(path)
            continue
        ordinal = _ordinal(path)
        if not (device.startswith("cuda") or own):
            raise ValueError(f"no path {path!r} to {device!r}: only CUDA devices have paths")
        if ordinal in ordinals:
            raise ValueError(f"path {path!r} is named twice")
        ordinals.append(ordinal)
    driver = own or open_driver(device, pump=pump, peers=ordinals)
    neighbours += [open_driver(f"cuda:{ordinal}", pump=pump) for ordinal in ordinals]
    return driver, neighbours


def _ordinal(path: object) -> int:
    try:
        ordinal = checked_device(path).partition(":")[2]
    except (TypeError, ValueError):
        ordinal = ""
    if not ordinal:
        raise ValueError(f"path {check.shown(path)} must be 'cuda:N', another CUDA device")
    return int(ordinal)
