"""The devices a runtime works with: its own, and neighbours whose host links its loads may use.

A load's chunks go over whichever of these links will have carried them first, at the speed each
was last measured to have: a slow or busy one takes few. By a neighbour they go to a little of its
memory and from there peer to peer.
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
    """Returns the drivers of the device and of the neighbours named by ``paths``, "cuda:N" each. If
    the drivers themselves are given, that of the device has let the neighbours in (``peers``).

    Raises ValueError for a path that is no "cuda:N", the device itself or named twice, and for
    a neighbour that does not reach the device's memory; otherwise as
    :func:`devices.open_driver`.
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
