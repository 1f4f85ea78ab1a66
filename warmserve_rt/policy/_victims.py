"""Choose the layers to drop so that others have room, and bound their value from below."""

from __future__ import annotations

import numpy as np

from ._arrays import I64
from ._compiled import jit
from ._copies import Copies, Devices, Models, cut, nbytes, segment, worth_of


@jit
def room_costs(devices: Devices, first: int, width: int, more: float) -> float:
    """Return a lower bound of the seconds lost for ``more`` bytes on every device of a group.

    It is less than the true bound by more than rounding, so that it never rejects an offer that
    :func:`victims` would find room for.
    """
    most = 0.0
    for d in range(first, first + width):
        lacking = more - devices.free[d]
        if lacking > 0:
            most = max(most, devices.cheapest[d] * lacking)
    return most * (1 - 1e-9)


@jit
def victims(
    models: Models,
    copies: Copies,
    devices: Devices,
    first: int,
    width: int,
    more: float,
    worth: float,
    own: int,
    rows: I64,
    left: I64,
) -> tuple[int, float]:
    """Choose tail layers to drop for ``more`` bytes on every device of a group.

    Write the copies that lose layers to ``rows``, and the layers that they keep to ``left``. Return
    the number of these copies and the seconds lost. The number is -1 if the loss reaches ``worth``,
    or if too little can be dropped.
    """
    count, lost, found = 0, 0.0, True
    for d in range(first, first + width):
        lacking = more - devices.free[d]
        if lacking <= 0:
            continue
        for i in range(count):
            r = rows[i]
            m = copies.model[r]
            if copies.first[r] <= d < copies.first[r] + models.width[m]:
                lacking -= nbytes(models, m, left[i], copies.layers[r])
        while lacking > 0 and found:
            best, least, floor, loss = -1, np.inf, 0, 0.0
            for j in range(devices.filled[d]):
                r = devices.rows[d, j]
                if copies.fixed[r] or r == own:
                    continue
                m, before, layers = copies.model[r], copies.before[r], copies.layers[r]
                if copies.slot[r] >= 0:
                    layers = left[copies.slot[r]]
                    before = segment(models, m, layers)
                if not layers:
                    continue
                keep = cut(models, m, before, layers, lacking)
                gone = worth_of(models, m, keep, layers) * copies.use[r]
                each = gone / min(nbytes(models, m, keep, layers), lacking)
                if each < least or (each == least and r < best):  # the first row of equals
                    best, least, floor, loss = r, each, keep, gone
            lost += loss
            if best < 0 or lost >= worth:
                found = False
                break
            place = copies.slot[best]
            have = copies.layers[best] if place < 0 else left[place]
            lacking -= nbytes(models, copies.model[best], floor, have)
            if place < 0:
                place = copies.slot[best] = count
                count += 1
            rows[place], left[place] = best, floor
        if not found:
            break
    for i in range(count):
        copies.slot[rows[i]] = -1
    return count if found else -1, lost
