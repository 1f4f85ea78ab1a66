"""The tables of an exchange: models, the copies that devices hold, and what is derived from them.

Compiled functions update the derived columns after a change of the copies.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._arrays import F64, I64
from ._compiled import jit


class Models(NamedTuple):
    """The value curves of all models.

    ``cum`` and ``value`` [points]: bytes and value of each number of layers; those of model m begin
    at ``begin[m]``. ``stops``: those of model m begin at ``stop[m]``, and the first is 0. ``width``
    and ``need`` [models].
    """

    begin: I64
    cum: F64
    value: F64
    stop: I64
    stops: I64
    width: I64
    need: F64


class Copies(NamedTuple):
    """The held copies [rows], with spare rows. The ``model`` of a free row is -1.

    ``use``: the probability that a start uses the copy. ``before``: the last stop below ``layers``.
    ``cheapest``: no layers at its end can be dropped for fewer seconds per byte; infinite if none
    may be dropped. ``next``: the next row of the same model in rising order, or -1. ``head``
    [models]: the first row of each model, or -1. ``slot``: -1, except inside :func:`victims`.
    """

    model: I64
    first: I64
    layers: I64
    fixed: I64
    use: F64
    before: I64
    cheapest: F64
    next: I64
    head: I64
    slot: I64


class Devices(NamedTuple):
    """The devices.

    ``free``: bytes. ``available``: the probability that a start can use the device. ``rows``
    [devices, n]: the first ``filled`` are the rows of the copies on the device, in no order.
    ``cheapest``: the lowest of its copies, or infinite. ``changed``: the number of exchanges up to
    and including the last one that changed the device.
    """

    free: F64
    available: F64
    rows: I64
    filled: I64
    cheapest: F64
    changed: I64


@jit
def chance(available: F64, first: int, width: int) -> float:
    """Return the probability that a start can use all devices of a group."""
    found = 1.0
    for d in range(first, first + width):
        found *= available[d]
    return found


@jit
def nbytes(models: Models, m: int, low: int, high: int) -> float:
    """Return the bytes of layers ``low`` to ``high`` on each device."""
    begin = models.begin[m]
    return float(models.cum[begin + high] - models.cum[begin + low])


@jit
def worth_of(models: Models, m: int, low: int, high: int) -> float:
    """Return the seconds that layers ``low`` to ``high`` save.

    Uses the curve, not its hull: the hull would credit part of a step that has value only as a
    whole.
    """
    begin = models.begin[m]
    return float((models.value[begin + high] - models.value[begin + low]) * models.need[m])


@jit
def segment(models: Models, m: int, layers: int) -> int:
    """Return the last stop below ``layers``."""
    before = 0
    for k in range(models.stop[m], models.stop[m + 1]):
        if models.stops[k] >= layers:
            break
        before = models.stops[k]
    return before


@jit
def cut(models: Models, m: int, low: int, high: int, lacking: float) -> int:
    """Return how many of ``high`` layers can stay if ``lacking`` bytes on each device must become
    free, but at least ``low``, even if that frees fewer bytes."""
    begin = models.begin[m]
    enough = models.cum[begin + high] - lacking
    while low < high:
        middle = (low + high + 1) // 2
        if models.cum[begin + middle] <= enough:
            low = middle
        else:
            high = middle - 1
    return low


@jit
def order(models: Models, copies: Copies, available: F64, m: int) -> float:
    """Set each copy's share of its model's starts; return the share of starts that find no copy."""
    width, count = models.width[m], 0
    r = copies.head[m]
    while r >= 0:
        count, r = count + 1, copies.next[r]
    rows, rank = np.empty(count, np.int64), np.empty(count)
    r = copies.head[m]
    for i in range(count):
        rows[i], rank[i] = r, -copies.layers[r] * chance(available, copies.first[r], width)
        r = copies.next[r]
    left = 1.0
    for i in np.argsort(rank, kind="mergesort"):
        r = rows[i]
        c = chance(available, copies.first[r], width)
        copies.use[r] = left * c
        left *= 1.0 - c
        copies.before[r] = segment(models, m, copies.layers[r])
    return left


@jit
def tail_costs(models: Models, copies: Copies, r: int) -> float:
    """Return the fewest seconds per byte for which any layers at a copy's end can be dropped."""
    if copies.fixed[r]:
        return np.inf
    m, layers, least = copies.model[r], copies.layers[r], np.inf
    for keep in range(layers):
        lost = worth_of(models, m, keep, layers) * copies.use[r]
        least = min(least, lost / nbytes(models, m, keep, layers))
    return least


@jit
def renew(models: Models, copies: Copies, devices: Devices, tried: I64, made: int, m: int) -> float:
    """Update all that depends on a model's copies, and return the share of its starts that find no
    copy."""
    unserved = order(models, copies, devices.available, m)
    r = copies.head[m]
    while r >= 0:
        copies.cheapest[r] = tail_costs(models, copies, r)
        touch(copies, devices, made, copies.first[r], models.width[m])
        r = copies.next[r]
    tried[models.stop[m] : models.stop[m + 1]] = -1
    return unserved


@jit
def touch(copies: Copies, devices: Devices, made: int, first: int, width: int) -> None:
    """Update the devices of a group after their copies have changed."""
    for d in range(first, first + width):
        least = np.inf
        for j in range(devices.filled[d]):
            least = min(least, copies.cheapest[devices.rows[d, j]])
        devices.cheapest[d], devices.changed[d] = least, made


@jit
def put(models: Models, copies: Copies, devices: Devices, r: int) -> None:
    """Enter a row into the lists of its model and of its devices."""
    m = copies.model[r]
    before, after = -1, copies.head[m]
    while 0 <= after < r:
        before, after = after, copies.next[after]
    copies.next[r] = after
    if before < 0:
        copies.head[m] = r
    else:
        copies.next[before] = r
    for d in range(copies.first[r], copies.first[r] + models.width[m]):
        devices.rows[d, devices.filled[d]] = r
        devices.filled[d] += 1


@jit
def take(models: Models, copies: Copies, devices: Devices, r: int) -> None:
    """Remove a row from the lists of its model and of its devices, and free it."""
    m = copies.model[r]
    before, at = -1, copies.head[m]
    while at != r:
        before, at = at, copies.next[at]
    if before < 0:
        copies.head[m] = copies.next[r]
    else:
        copies.next[before] = copies.next[r]
    for d in range(copies.first[r], copies.first[r] + models.width[m]):
        last = devices.filled[d] - 1
        for j in range(last):
            if devices.rows[d, j] == r:
                devices.rows[d, j] = devices.rows[d, last]
        devices.filled[d] = last
    copies.model[r] = -1


@jit
def spend(free: F64, first: int, width: int, more: float) -> None:
    """Subtract bytes from each device of a group."""
    for d in range(first, first + width):
        free[d] -= more
