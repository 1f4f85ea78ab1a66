"""The devices a runtime works with: its own, and neighbours whose host links its loads may use.

A load's chunks go over whichever of these links will have carried them first, at the speed each
was last measured to have: a slow or busy one takes few. By a neighbour they go to a little of its
memory and from there peer to peer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeAlias

from . import _native
from .devices import open_driver

Path: TypeAlias = str | _native.Driver


def open_devices(
    device: str, own: _native.Driver | None, paths: Sequence[Path], *, pump: bool
) -> tuple[_native.Driver, list[_native.Driver]]:
    """The drivers of the device and of the neighbours named by ``paths``, "cuda:N" each. Where
    the drivers themselves are given, that of the device has let the neighbours in (``peers``).

    Raises ValueError for a path that is no "cuda:N", the device itself or named twice, and for
    a neighbour that does not reach the device's memory; otherwise as
    :func:`devices.open_driver`.
    """
    neighbours = [path for path in paths if not isinstance(path, str)]
    ordinals: list[int] = []
    for path in paths:
        if not isinstance(path, str):
            continue
        named = re.fullmatch(r"cuda:(\d+)", path)
        if not named or not (device.startswith("cuda") or own):
            raise ValueError(
                f"no path {path!r} to {device!r}: it is 'cuda:N', to another of CUDA's"
            )
        if int(named[1]) in ordinals:
            raise ValueError(f"path {path!r} is named twice")
        ordinals.append(int(named[1]))
    driver = own or open_driver(device, pump=pump, peers=ordinals)
    neighbours += [open_driver(f"cuda:{ordinal}", pump=pump) for ordinal in ordinals]
    return driver, neighbours
