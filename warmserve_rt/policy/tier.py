"""Choose the layers that a tier of limited bytes holds: those with the most value per byte."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ._arrays import F64, I64


def fill_tier(
    density: Sequence[F64],
    nbytes: Sequence[I64],
    held: Sequence[Sequence[bool]],
    room: float,
    *,
    margin: float,
) -> list[NDArray[np.bool_]]:
    """Return for each model which of its layers the tier holds.

    Layers are taken in falling order of value per byte, each if it still has room. A layer without
    value is not taken. The value of the result is therefore less than the best possible one by at
    most the value of one layer, if the margin is 0.

    Parameters
    ----------
    density
        For each model the value per byte of each layer.
    nbytes
        For each model the bytes of each layer in the tier.
    held
        For each model whether the tier holds each layer now.
    room
        Bytes of the tier.
    margin
        The share by which the value per byte of a layer must exceed that of a layer that is held,
        to take its place.
    """
    chosen = [np.zeros(len(each), np.bool_) for each in density]
    if not chosen:
        return chosen
    worth = np.concatenate(density)
    size = np.concatenate(nbytes)
    rank = worth * np.where(np.concatenate(held), 1.0 + margin, 1.0)
    flat = np.zeros(len(worth), np.bool_)
    order = np.argsort(-rank, kind="stable")
    order = order[worth[order] > 0]
    ends = np.cumsum(size[order])
    whole = int(np.searchsorted(ends, room, side="right"))  # these fit together
    flat[order[:whole]] = True
    left = room - float(ends[whole - 1] if whole else 0)
    for layer in order[whole:].tolist():
        if size[layer] <= left:
            flat[layer] = True
            left -= float(size[layer])
    return np.split(flat, np.cumsum([len(each) for each in density])[:-1])
