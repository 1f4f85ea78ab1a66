"""The loops of :mod:`improve`, compiled."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ._greedy import F64, I64
from ._greedy import _entry as jit


class Models(NamedTuple):
    """``cum`` and ``value`` [points] of each number of layers, from ``begin[m]`` on; ``knots`` of
    the hulls from ``knot[m]`` on, the first 0; ``width`` and ``need`` [models]."""

    begin: I64
    cum: F64
    value: F64
    knot: I64
    knots: I64
    width: I64
    need: F64


class Copies(NamedTuple):
    """Arrays with room for more; ``model`` -1 marks a free row."""

    model: I64
    first: I64
    layers: I64
    fixed: I64
    use: F64
    per_byte: F64
    before: I64


@jit
def chance(available: F64, first: int, width: int) -> float:
    found = 1.0
    for d in range(first, first + width):
        found *= available[d]
    return found


@jit
def tail(models: Models, m: int, layers: int, use: float) -> tuple[float, int]:
    """Of the last segment of so many layers: seconds lost for a byte on each device, and the layers
    before it."""
    begin, before = models.begin[m], 0
    for k in range(models.knot[m], models.knot[m + 1]):
        if models.knots[k] >= layers:
            break
        before = models.knots[k]
    size = models.cum[begin + layers] - models.cum[begin + before]
    gone = (models.value[begin + layers] - models.value[begin + before]) * models.need[m]
    return gone * use / max(size, 1.0), before


@jit
def order(models: Models, copies: Copies, available: F64, m: int) -> float:
    """Gives each copy of a model its share of the starts; returns the share that finds none."""
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
        copies.per_byte[r], copies.before[r] = tail(models, m, copies.layers[r], copies.use[r])
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
    """Tail layers to drop for ``more`` bytes on every device of the group: how many rows of
    ``rows`` and ``left`` it has written, and the seconds lost; -1 where it costs ``worth``."""
    count, lost = 0, 0.0
    for d in range(first, first + width):
        lacking = more - free[d]
        if lacking <= 0:
            continue
        for i in range(count):
            r = rows[i]
            w = models.width[copies.model[r]]
            if copies.first[r] <= d < copies.first[r] + w:
                begin = models.begin[copies.model[r]]
                lacking -= models.cum[begin + copies.layers[r]] - models.cum[begin + left[i]]
        while lacking > 0:
            best, chosen, least, stop, have = -1, -1, np.inf, 0, 0
            for r in range(len(copies.model)):
                m = copies.model[r]
                if m < 0 or copies.fixed[r] or r == own:
                    continue
                if not copies.first[r] <= d < copies.first[r] + models.width[m]:
                    continue
                per_byte, before, layers, place = (
                    copies.per_byte[r],
                    copies.before[r],
                    copies.layers[r],
                    -1,
                )
                for i in range(count):
                    if rows[i] == r:
                        layers, place = left[i], i
                        per_byte, before = tail(models, m, layers, copies.use[r])
                if layers > 0 and per_byte < least:
                    best, chosen, least, stop, have = r, place, per_byte, before, layers
            if best < 0:
                return -1, lost
            begin, keep = models.begin[copies.model[best]], have
            while keep > stop and models.cum[begin + have] - models.cum[begin + keep] < lacking:
                keep -= 1
            freed = models.cum[begin + have] - models.cum[begin + keep]
            lost += least * freed
            if lost >= worth or (chosen < 0 and count == len(rows)):
                return -1, lost
            if chosen < 0:
                chosen = count
                count += 1
            rows[chosen], left[chosen] = best, keep
            lacking -= freed
    return count, lost


@jit
def spend(free: F64, first: int, width: int, more: float) -> None:
    for d in range(first, first + width):
        free[d] -= more


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
    """Makes the best exchanges, at most ``moves``; returns how many it has made."""
    count = len(models.width)
    unserved = np.ones(count)
    for m in range(count):
        unserved[m] = order(models, copies, available, m)
    size = len(copies.model)
    rows, left = np.empty(64, np.int64), np.empty(64, np.int64)
    best_rows, best_left = np.empty(64, np.int64), np.empty(64, np.int64)
    density = np.empty(size + count)
    gain, more = np.empty(size + count), np.empty(size + count)
    made = 0
    while made < moves:
        n = 0
        offer = np.empty(size + count, np.int64)  # a row, or -1 - model for a new copy
        end = np.empty(size + count, np.int64)
        held = np.zeros(count, np.int64)
        for r in range(size):
            m = copies.model[r]
            if m < 0:
                continue
            held[m] += 1
            if copies.fixed[r] or models.need[m] <= 0:
                continue
            begin, layers = models.begin[m], copies.layers[r]
            for k in range(models.knot[m], models.knot[m + 1]):
                to = models.knots[k]
                if to > layers:
                    worth = models.value[begin + to] - models.value[begin + layers]
                    worth *= models.need[m] * copies.use[r]
                    if worth > 0:
                        offer[n], end[n], gain[n] = r, to, worth
                        more[n] = models.cum[begin + to] - models.cum[begin + layers]
                        density[n] = worth / more[n] / models.width[m]
                        n += 1
                    break
        for m in range(count):
            if models.need[m] <= 0 or held[m] >= min(most, len(free) // models.width[m]):
                continue
            if models.knot[m + 1] - models.knot[m] < 2:
                continue
            begin, to = models.begin[m], models.knots[models.knot[m] + 1]
            worth = models.need[m] * unserved[m] * models.value[begin + to]
            if worth > 0:
                offer[n], end[n], gain[n], more[n] = -1 - m, to, worth, models.cum[begin + to]
                density[n] = worth / more[n] / models.width[m]
                n += 1
        moved = False
        for i in np.argsort(-density[:n], kind="mergesort"):
            r = offer[i]
            m = copies.model[r] if r >= 0 else -1 - r
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
                    more[i],
                    gain[i] / (1 + margin),
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
                    worth = gain[i] * chance(available, first, width)
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
                        more[i],
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
                begin = models.begin[vm]
                freed = models.cum[begin + copies.layers[v]] - models.cum[begin + best_left[j]]
                spend(free, copies.first[v], models.width[vm], -freed)
                copies.layers[v] = best_left[j]
                if best_left[j] == 0:
                    copies.model[v] = -1
                unserved[vm] = order(models, copies, available, vm)
            copies.model[r], copies.first[r], copies.layers[r] = m, place, end[i]
            copies.fixed[r] = 0
            spend(free, place, width, more[i])
            unserved[m] = order(models, copies, available, m)
            moved = True
            break
        if not moved:
            return made
        made += 1
    return made
