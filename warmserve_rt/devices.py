"""Devices by name: ``"host"``, ``"cuda"`` (the first) and ``"cuda:N"``."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from . import _native
from ._errors import WarmServeError
from .kernels import fatbin_path

DEFAULT_ARENA = 2 << 30


def open_driver(device: str, *, pump: bool, peers: Sequence[int] = ()) -> _native.Driver:
    """``peers``: ordinals of CUDA devices that may write its memory. Raises ValueError for a name
    that is no device, an index that is not there or a peer that does not reach it, WarmServeError
    with what to do where the device cannot be used."""
    if device == "host":
        return _native.host_driver(threads=not pump)
    named = re.fullmatch(r"cuda(?::(\d+))?", device)
    if not named:
        raise ValueError(f"no device {device!r}: choose 'host', 'cuda' or 'cuda:N'")
    image = fatbin_path()
    try:
        return _native.cuda_driver(
            ordinal=int(named[1] or 0),
            kernels=image.read_bytes() if image else b"",
            peers=peers,
        )
    except (ValueError, WarmServeError) as error:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        if hidden is None or "device" not in str(error):
            raise
        raise type(error)(f"{error} (CUDA_VISIBLE_DEVICES is {hidden!r})") from None


def loader_count(asked: int | None, *, pump: bool) -> int:
    """How many threads load; with ``pump`` none. Raises ValueError for fewer than one."""
    if asked is not None and asked < 1:
        raise ValueError(f"{asked} loaders: for none, say pump=True")
    return 0 if pump else asked or max(1, min(8, len(os.sched_getaffinity(0)) - 1))


def arena_bytes(
    driver: _native.Driver, asked: int | None, headroom: int | None, granule: int, *, poison: bool
) -> int:
    """How large an arena is made: what was asked for; or, where a headroom was, all that the device
    has free beside it."""
    if asked is not None:
        return asked
    if headroom is None:
        return DEFAULT_ARENA
    available, _ = driver.memory()
    return max(0, available - headroom - granule * poison) // granule * granule
