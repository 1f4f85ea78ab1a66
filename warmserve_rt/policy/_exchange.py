"""The compiled loops of :mod:`improve`.

All loops are in one file, because the compiler's cache checks the date of the file that contains
the called function, and not those of the functions it calls.

A fleet of 1000 devices and 10,000 models has tens of thousands of offers, nearly all of which gain
too little. Three things keep them cheap. Each device knows its copies. A lower bound of what room
costs on a device (:func:`room_costs`) rejects most offers without a choice of victims. A device on
which an offer failed is asked again only after it has changed.
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


@jit
def spend(free: F64, first: int, width: int, more: float) -> None:
    """Subtract bytes from each device of a group."""
    for d in range(first, first + width):
        free[d] -= more


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
    """Append to ``offers``, from index ``n`` on, the gain of each later stop for copy r, or for a
    new copy if r is negative, unless its room costs too much. Return the new number of offers.

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
def place_copy(
    models: Models,
    copies: Copies,
    devices: Devices,
    node: int,
    margin: float,
    m: int,
    gain: float,
    more: float,
    since: int,
    rows: I64,
    left: I64,
    best_rows: I64,
    best_left: I64,
) -> tuple[int, int]:
    """Choose the group for a new copy by the highest gain less the loss of its victims.

    Consider groups that changed in an exchange after ``since``. Write the victims to ``best_rows``
    and ``best_left``. Return the first device of the group, or -1, and the number of victims.
    """
    width = models.width[m]
    place, found, net = -1, 0, 0.0
    for first in range(0, len(devices.free) - width + 1, width):
        if first // node != (first + width - 1) // node:
            continue
        newest = -1
        for d in range(first, first + width):
            newest = max(newest, devices.changed[d])
        if newest <= since:
            continue
        worth = gain * chance(devices.available, first, width)
        costs = room_costs(devices, first, width, more)
        if worth <= net or costs >= worth / (1 + margin) or worth - (1 + margin) * costs <= net:
            continue
        held = False
        r = copies.head[m]
        while r >= 0:
            held = held or copies.first[r] == first
            r = copies.next[r]
        if held:
            continue
        got, lost = victims(
            models, copies, devices, first, width, more, worth / (1 + margin), -1, rows, left
        )
        gained = worth - (1 + margin) * lost
        if got >= 0 and gained > net:
            net, place, found = gained, first, got
            best_rows[:got], best_left[:got] = rows[:got], left[:got]
    return place, found


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
