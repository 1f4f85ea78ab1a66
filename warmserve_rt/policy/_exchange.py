"""The compiled loops of :mod:`improve`."""

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


class Offers(NamedTuple):
    """Possible gains [offers]: extensions of copies, and new copies.

    ``row``: the copy to extend, or -1 for a new one. ``end``: its layers afterwards. ``gain``:
    seconds. ``more``: bytes on each device. ``density``: gain per byte of all devices.
    """

    row: I64
    model: I64
    end: I64
    gain: F64
    more: F64
    density: F64


class Copies(NamedTuple):
    """The held copies [rows], with spare rows. The ``model`` of a free row is -1.

    ``use``: the probability that a start uses the copy. ``before``: the last stop below ``layers``.
    """

    model: I64
    first: I64
    layers: I64
    fixed: I64
    use: F64
    before: I64


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
    width = models.width[m]
    rows = np.flatnonzero(copies.model == m)
    rank = np.empty(len(rows))
    for i in range(len(rows)):
        r = rows[i]
        rank[i] = -copies.layers[r] * chance(available, copies.first[r], width)
    left = 1.0
    for i in np.argsort(rank, kind="mergesort"):
        r = rows[i]
        c = chance(available, copies.first[r], width)
        copies.use[r] = left * c
        left *= 1.0 - c
        copies.before[r] = segment(models, m, copies.layers[r])
    return left


@jit
def victims(
    models: Models,
    copies: Copies,
    free: F64,
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
    if too little can be dropped, or if ``rows`` is full.
    """
    count, lost = 0, 0.0
    for d in range(first, first + width):
        lacking = more - free[d]
        if lacking <= 0:
            continue
        for i in range(count):
            r = rows[i]
            m = copies.model[r]
            if copies.first[r] <= d < copies.first[r] + models.width[m]:
                lacking -= nbytes(models, m, left[i], copies.layers[r])
        while lacking > 0:
            best, chosen, least, floor, loss = -1, -1, np.inf, 0, 0.0
            for r in range(len(copies.model)):
                m = copies.model[r]
                if m < 0 or copies.fixed[r] or r == own:
                    continue
                if not copies.first[r] <= d < copies.first[r] + models.width[m]:
                    continue
                before, layers, place = copies.before[r], copies.layers[r], -1
                for i in range(count):
                    if rows[i] == r:
                        layers, place = left[i], i
                        before = segment(models, m, layers)
                if not layers:
                    continue
                keep = cut(models, m, before, layers, lacking)
                gone = worth_of(models, m, keep, layers) * copies.use[r]
                freed = nbytes(models, m, keep, layers)
                each = gone / min(freed, lacking)
                if each < least:
                    best, chosen, least, floor, loss = r, place, each, keep, gone
            if best < 0:
                return -1, lost
            lost += loss
            if lost >= worth or (chosen < 0 and count == len(rows)):
                return -1, lost
            have = copies.layers[best] if chosen < 0 else left[chosen]
            lacking -= nbytes(models, copies.model[best], floor, have)
            if chosen < 0:
                chosen = count
                count += 1
            rows[chosen], left[chosen] = best, floor
    return count, lost


@jit
def spend(free: F64, first: int, width: int, more: float) -> None:
    """Subtract bytes from each device of a group."""
    for d in range(first, first + width):
        free[d] -= more


@jit
def offer(
    models: Models, copies: Copies, r: int, use: float, m: int, offers: Offers, n: int
) -> int:
    """Append to ``offers``, from index ``n`` on, the gain of each later stop for copy r, or for a
    new copy if r is negative. Return the new number of offers."""
    layers = copies.layers[r] if r >= 0 else 0
    for k in range(models.stop[m], models.stop[m + 1]):
        end = models.stops[k]
        gain = worth_of(models, m, layers, end) * use if end > layers else 0.0
        if gain > 0:
            offers.row[n], offers.end[n], offers.gain[n] = r, end, gain
            offers.model[n], offers.more[n] = m, nbytes(models, m, layers, end)
            offers.density[n] = gain / offers.more[n] / models.width[m]
            n += 1
    return n


@jit
def exchange(
    models: Models,
    copies: Copies,
    free: F64,
    available: F64,
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
    count = len(models.width)
    unserved = np.ones(count)
    for m in range(count):
        unserved[m] = order(models, copies, available, m)
    size = len(copies.model)
    rows, left = np.empty(64, np.int64), np.empty(64, np.int64)
    best_rows, best_left = np.empty(64, np.int64), np.empty(64, np.int64)
    room = (size + count) * np.max(models.stop[1:] - models.stop[:-1])
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
        n = 0
        held = np.zeros(count, np.int64)
        for r in range(size):
            m = copies.model[r]
            if m >= 0:
                held[m] += 1
                if not copies.fixed[r]:
                    n = offer(models, copies, r, copies.use[r], m, offers, n)
        for m in range(count):
            if held[m] < min(most, len(free) // models.width[m]):
                n = offer(models, copies, -1, unserved[m], m, offers, n)
        moved = False
        for i in np.argsort(-offers.density[:n], kind="mergesort"):
            r, m, more = offers.row[i], offers.model[i], offers.more[i]
            width = models.width[m]
            place, found = -1, 0
            if r >= 0:
                place = copies.first[r]
                found, lost = victims(
                    models,
                    copies,
                    free,
                    place,
                    width,
                    more,
                    offers.gain[i] / (1 + margin),
                    r,
                    best_rows,
                    best_left,
                )
                if found < 0:
                    continue
            else:
                net = 0.0
                for first in range(0, len(free) - width + 1, width):
                    if first // node != (first + width - 1) // node:
                        continue
                    worth = offers.gain[i] * chance(available, first, width)
                    if worth <= net:
                        continue
                    there = False
                    for other in range(size):
                        there = there or (copies.model[other] == m and copies.first[other] == first)
                    if there:
                        continue
                    got, lost = victims(
                        models,
                        copies,
                        free,
                        first,
                        width,
                        more,
                        worth / (1 + margin),
                        -1,
                        rows,
                        left,
                    )
                    gained = worth - (1 + margin) * lost
                    if got >= 0 and gained > net:
                        net, place, found = gained, first, got
                        best_rows[:got], best_left[:got] = rows[:got], left[:got]
                if place < 0:
                    continue
                r = -1
                for other in range(size):
                    if copies.model[other] < 0:
                        r = other
                        break
                if r < 0:
                    continue
            for j in range(found):
                v = best_rows[j]
                vm = copies.model[v]
                freed = nbytes(models, vm, best_left[j], copies.layers[v])
                spend(free, copies.first[v], models.width[vm], -freed)
                copies.layers[v] = best_left[j]
                if best_left[j] == 0:
                    copies.model[v] = -1
                unserved[vm] = order(models, copies, available, vm)
            copies.model[r], copies.first[r], copies.layers[r] = m, place, offers.end[i]
            copies.fixed[r] = 0
            spend(free, place, width, more)
            unserved[m] = order(models, copies, available, m)
            moved = True
            break
        if not moved:
            return made
        made += 1
    return made
