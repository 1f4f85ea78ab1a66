"""The devices of a runtime: its own, and peers whose host links its loads may use.

Each chunk of a load takes the link that would finish it first, at the speed last measured for each
link. Slow or busy links therefore get few chunks. A chunk that takes a peer's link is copied to a
small buffer in the peer's memory, and from there peer to peer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from warmserve_rt import _arguments as check
from warmserve_rt import _native

from .devices import checked_device, open_driver

Route: TypeAlias = str | _native.Driver


def open_devices(
    device: str, own: _native.Driver | None, routes: Sequence[Route], *, pump: bool
) -> tuple[_native.Driver, list[_native.Driver]]:
    """Return the driver of the device and the drivers of its peers.

    Parameters
    ----------
    device : str
    own : native driver or None
        The device's driver. Default: opened here.
    routes : sequence of "cuda:N" or native drivers
        The peers. If they are drivers, ``own`` must have been opened with them as ``peers``.
    pump : bool
        As for :func:`devices.open_driver`.

    Raises
    ------
    ValueError
        A route is not "cuda:N", is the device itself, is named twice, or cannot reach the device's
        memory.

    Other errors are those of :func:`devices.open_driver`.
    """
    peers: list[_native.Driver] = []
    ordinals: list[int] = []
    for route in check.sequence("routes", routes, "'cuda:N'"):
        if isinstance(route, _native.Driver):
            peers.append(route)
            continue
        ordinal = _ordinal(route)
        if not (device.startswith("cuda") or own):
            raise ValueError(f"no route {route!r} to {device!r}: only CUDA devices have routes")
        if ordinal in ordinals:
            raise ValueError(f"route {route!r} is named twice")
        ordinals.append(ordinal)
    driver = own or open_driver(device, pump=pump, peers=ordinals)
    peers += [open_driver(f"cuda:{ordinal}", pump=pump) for ordinal in ordinals]
    return driver, peers


def _ordinal(route: object) -> int:
    try:
        ordinal = checked_device(route).partition(":")[2]
    except (TypeError, ValueError):
        ordinal = ""
    if not ordinal:
        raise ValueError(f"route {check.shown(route)} must be 'cuda:N', another CUDA device")
    return int(ordinal)
