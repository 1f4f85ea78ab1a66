"""The compiled loops of :mod:`improve`: which exchange of layers gains most.

A fleet of 1000 devices and 10,000 models has tens of thousands of offers, nearly all of which gain
too little. Three rules keep them cheap. Each device knows its copies. :func:`room_costs`, a lower
bound of the seconds lost, rejects most offers without a choice of victims. A device on which an
offer failed is asked again only after it has changed.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._arrays import F64, I64
from ._compiled import jit
from ._copies import Copies, Devices, Models, nbytes, put, renew, spend, take, touch, worth_of
from ._places import place_copy
from ._victims import room_costs, victims


class Offers(NamedTuple):
    """Possible gains [offers]: extensions of copies, and new copies.

    ``row``: the copy to extend, or -1 for a new one. ``stop``: the index of its stop afterwards.
    ``gain``: seconds. ``more``: bytes on each device. ``density``: gain per byte of all devices.
    """

    row: I64
    model: I64
    stop: I64
    gain: F64
    more: F64
    density: F64


@jit
def offer(
    models: Models,
    copies: Copies,
    devices: Devices,
    r: int,
    use: float,
    m: int,
    margin: float,
    most_free: float,
    cheapest: float,
    offers: Offers,
    n: int,
) -> int:
    """Append the gain of each later stop of copy r to ``offers``, and return their new number.

    If r is negative, the stops are those of a new copy. The first free index of ``offers`` is
    ``n``. A stop whose room costs too much is left out.

    ``most_free`` and ``cheapest``: the most free bytes and the cheapest room of any device.
    """
    layers = copies.layers[r] if r >= 0 else 0
    for k in range(models.stop[m], models.stop[m + 1]):
        end = models.stops[k]
        gain = worth_of(models, m, layers, end) * use if end > layers else 0.0
        if gain <= 0:
            continue
        more = nbytes(models, m, layers, end)
        if r >= 0:
            costs = room_costs(devices, copies.first[r], models.width[m], more)
        else:
            costs = cheapest * (more - most_free) * (1 - 1e-9) if more > most_free else 0.0
        if costs >= gain / (1 + margin):
            continue
        offers.row[n], offers.stop[n], offers.gain[n] = r, k, gain
        offers.model[n], offers.more[n] = m, more
        offers.density[n] = gain / more / models.width[m]
        n += 1
    return n


@jit
def exchange(
    models: Models,
    copies: Copies,
    devices: Devices,
    node: int,
    margin: float,
    most: int,
    moves: int,
) -> int:
    """Make at most ``moves`` exchanges, those with the highest gain per byte first. Return their
    number.

    Gain and loss are taken from the curves, not their hulls. Every exchange therefore raises the
    total value of the held layers, so that the exchanges terminate.
    """
    count, size = len(models.width), len(copies.model)
    # For each stop: the number of exchanges after which a new copy up to it found no group.
    tried = np.full(len(models.stops), -1)
    for r in range(size):
        if copies.model[r] >= 0:
            put(models, copies, devices, r)
    unserved = np.ones(count)
    for m in range(count):
        unserved[m] = renew(models, copies, devices, tried, 0, m)
    rows, left = np.empty(size, np.int64), np.empty(size, np.int64)
    best_rows, best_left = np.empty(size, np.int64), np.empty(size, np.int64)
    room = 0
    for m in range(count):
        room += models.stop[m + 1] - models.stop[m]
    for r in range(size):
        m = copies.model[r]
        room += models.stop[m + 1] - models.stop[m] if m >= 0 else 0
    room += moves * np.max(models.stop[1:] - models.stop[:-1])
    offers = Offers(
        np.empty(room, np.int64),
        np.empty(room, np.int64),
        np.empty(room, np.int64),
        np.empty(room),
        np.empty(room),
        np.empty(room),
    )
    made = 0
    while made < moves:
        n, most_free, cheapest = 0, np.max(devices.free), np.min(devices.cheapest)
        held = np.zeros(count, np.int64)
        for r in range(size):
            m = copies.model[r]
            if m >= 0:
                held[m] += 1
                if not copies.fixed[r]:
                    use = copies.use[r]
                    n = offer(
                        models, copies, devices, r, use, m, margin, most_free, cheapest, offers, n
                    )
        for m in range(count):
            if held[m] < min(most, len(devices.free) // models.width[m]):
                use = unserved[m]
                n = offer(
                    models, copies, devices, -1, use, m, margin, most_free, cheapest, offers, n
                )
        moved = False
        for i in np.argsort(-offers.density[:n], kind="mergesort"):
            r, m, more, stop = offers.row[i], offers.model[i], offers.more[i], offers.stop[i]
            width = models.width[m]
            if r >= 0:
                place, worth = copies.first[r], offers.gain[i] / (1 + margin)
                found, _ = victims(
                    models, copies, devices, place, width, more, worth, r, best_rows, best_left
                )
                if found < 0:
                    continue
            else:
                place, found = place_copy(
                    models,
                    copies,
                    devices,
                    node,
                    margin,
                    m,
                    offers.gain[i],
                    more,
                    tried[stop],
                    rows,
                    left,
                    best_rows,
                    best_left,
                )
                if place < 0:
                    tried[stop] = made
                    continue
                r = 0
                while copies.model[r] >= 0:  # there are as many spare rows as moves
                    r += 1
            made += 1
            new = copies.model[r] < 0
            for j in range(found):
                v = best_rows[j]
                vm, at = copies.model[v], copies.first[v]
                freed = nbytes(models, vm, best_left[j], copies.layers[v])
                spend(devices.free, at, models.width[vm], -freed)
                copies.layers[v] = best_left[j]
                if best_left[j] == 0:
                    take(models, copies, devices, v)
                unserved[vm] = renew(models, copies, devices, tried, made, vm)
                touch(copies, devices, made, at, models.width[vm])
            copies.model[r], copies.first[r], copies.layers[r] = m, place, models.stops[stop]
            copies.fixed[r] = 0
            if new:
                put(models, copies, devices, r)
            spend(devices.free, place, width, more)
            unserved[m] = renew(models, copies, devices, tried, made, m)
            moved = True
            break
        if not moved:
            return made
    return made
