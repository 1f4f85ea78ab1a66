"""The compiled loops of the residency planner."""

from __future__ import annotations

import heapq
from typing import NamedTuple

import numpy as np

from warmserve_rt.policy._arrays import F64, I64, Bools
from warmserve_rt.policy._compiled import jit, jit_inner


class Points(NamedTuple):
    """The value curves of all models, point by point.

    Those of model m begin at ``begin[m]``, one for each number of leading layers from 0 on, with
    the cumulative bytes on each device (``cum``) and the value of holding them (``value``).
    ``kind`` [models]: the index of the model's width in ``kinds``.
    """

    begin: I64
    cum: I64
    value: F64
    kind: I64


class Items(NamedTuple):
    """The segments of all needed replicas, cut at the last layer that is held already.

    ``row``: the replica. ``stop``: its layers with this segment. ``nbytes``: bytes on each device.
    ``density``: value per byte of all devices. ``there``: whether the layers are held.
    """

    row: I64
    stop: I64
    nbytes: F64
    density: F64
    there: Bools


class Replicas(NamedTuple):
    """Replicas [n]: ``model``, ``need``, and the first device of the group that holds layers of the
    replica now, or -1 (``home``)."""

    model: I64
    need: F64
    home: I64


class Forest(NamedTuple):
    """The free bytes of the devices, and where most are free.

    A kind is one of the distinct widths. ``kinds`` [K, 4] has its width, its number of aligned
    groups, and the number of leaves and the first node of its trees. ``amounts`` [3, D] has the
    bytes left on each device, the reserved bytes, and the availability. ``trees`` [3, nodes] has
    three maximum trees over the groups of each kind: FREE, the fewest bytes left on any device of
    the group; CLEAR, the same without reserved bytes; WANTED, CLEAR times the lowest availability
    in the group. ``node``: the number of devices of a node.
    """

    kinds: I64
    amounts: F64
    trees: F64
    node: int


WIDTH, COUNT, LEAVES, FIRST = 0, 1, 2, 3
LEFT, RESERVED, AVAILABLE = 0, 1, 2
FREE, CLEAR, WANTED = 0, 1, 2
_SAME = 1e-9  # relative: slopes that differ by less count as equal; the difference is rounding
_NOTHING = -np.inf


@jit
def relax(
    order: I64, width: I64, nbytes: F64, density: F64, chain: I64, slack: F64
) -> tuple[float, F64]:
    """Solve the linear relaxation; return its value and the share of each item.

    In ``order``, any share of an item is taken while bytes are left. An item is ``width`` devices
    wide and has ``nbytes`` on all of them together. ``slack``: for each width of ``chain``, the
    bytes left for items whose width is a multiple of it; changed.
    """
    share = np.zeros(len(width))
    value = 0.0
    for i in order:
        taken = nbytes[i]
        for c in range(len(chain)):
            if width[i] % chain[c] == 0:
                taken = min(taken, slack[c])
        if taken > 0.0:
            for c in range(len(chain)):
                if width[i] % chain[c] == 0:
                    slack[c] -= taken
            share[i] = taken / nbytes[i]
            value += taken * density[i]
    return value, share


@jit_inner
def least(amounts: F64, base: int, width: int) -> float:
    """Return the fewest bytes left on any device of a group."""
    found: float = amounts[LEFT, base]
    for d in range(base + 1, base + width):
        found = min(found, amounts[LEFT, d])
    return found


@jit_inner
def rise(trees: F64, tree: int, first: int, place: int) -> None:
    """Update the nodes above a leaf."""
    while place > 1:
        place //= 2
        most = max(trees[tree, first + 2 * place], trees[tree, first + 2 * place + 1])
        if trees[tree, first + place] == most:
            return
        trees[tree, first + place] = most


@jit_inner
def refresh(kinds: I64, amounts: F64, trees: F64, node: int, base: int, width: int) -> None:
    """Update the trees after amounts have changed on these devices of one node."""
    number, inside = base // node, base % node
    for c in range(len(kinds)):
        w = kinds[c, WIDTH]
        per_node = node // w
        for local in range(inside // w, min((inside + width - 1) // w + 1, per_node)):
            group = number * per_node + local
            if group >= kinds[c, COUNT]:
                break
            begin = number * node + local * w
            free, clear, available = np.inf, np.inf, np.inf
            for d in range(begin, begin + w):
                free = min(free, amounts[LEFT, d])
                clear = min(clear, amounts[LEFT, d] - amounts[RESERVED, d])
                available = min(available, amounts[AVAILABLE, d])
            first, place = kinds[c, FIRST], kinds[c, LEAVES] + group
            trees[FREE, first + place] = free
            trees[CLEAR, first + place] = clear
            trees[WANTED, first + place] = clear * available
            for tree in range(3):
                rise(trees, tree, first, place)


@jit_inner
def best(kinds: I64, trees: F64, tree: int, kind: int) -> int:
    """Return the highest leaf, the first of equals."""
    place, first = 1, int(kinds[kind, FIRST])
    while place < kinds[kind, LEAVES]:
        place *= 2
        if trees[tree, first + place] < trees[tree, first + place + 1]:
            place += 1
    return first + place


@jit_inner
def choose(
    kinds: I64,
    amounts: F64,
    trees: F64,
    node: int,
    kind: int,
    home: int,
    sibling: int,
    older: I64,
    group: I64,
    nbytes: float,
) -> int:
    """Return the first device of the group for a row's first ``nbytes``, or -1.

    The choice is, in this order: the home if the bytes fit there; a group in which they fit beside
    reserved bytes, the one with most room by availability or else the one with most room; the home;
    the group with most room, reserved bytes included. Groups of siblings (other rows of the same
    model) are excluded.
    """
    w, per_node = kinds[kind, WIDTH], node // kinds[kind, WIDTH]
    if kinds[kind, COUNT] == 0:
        return -1
    first = kinds[kind, FIRST]
    other = sibling
    while other >= 0:
        taken = group[other]
        if taken == home:
            home = -1
        place = kinds[kind, LEAVES] + taken // node * per_node + taken % node // w
        for tree in range(3):
            trees[tree, first + place] = _NOTHING
            rise(trees, tree, first, place)
        other = older[other]
    if home >= 0 and least(amounts, home, w) >= nbytes:
        base = home
    else:
        leaf = best(kinds, trees, WANTED, kind)
        if trees[CLEAR, leaf] < nbytes:
            leaf = best(kinds, trees, CLEAR, kind)
        if home >= 0 and trees[CLEAR, leaf] < nbytes:
            base = home
        else:
            if trees[FREE, leaf] < nbytes:
                leaf = best(kinds, trees, FREE, kind)
            number = leaf - first - kinds[kind, LEAVES]
            base = int(number // per_node * node + number % per_node * w)
            if trees[FREE, leaf] == _NOTHING:
                base = -1
    other = sibling
    while other >= 0:
        refresh(kinds, amounts, trees, node, group[other], w)
        other = older[other]
    return base


@jit_inner
def part(cum: I64, value: F64, begin: int, end: int, k: int, left: float) -> tuple[int, float]:
    """Return the number of layers above k that adds most value per byte within ``left`` bytes of
    each device, and that value per byte."""
    found, slope = k, 0.0
    for j in range(k + 1, end - begin):
        nbytes = cum[begin + j] - cum[begin + k]
        if nbytes > left:
            break
        this = (value[begin + j] - value[begin + k]) / nbytes
        if this > 0.0 and this >= slope * (1 - _SAME):
            found, slope = j, max(this, slope)
    return found, slope


@jit
def walk(
    order: I64, density: F64, stays: Bools, items: Items, rows: Replicas, points: Points, on: Forest
) -> tuple[I64, I64]:
    """Run the greedy over the items in ``order``; return the group (first device or -1) and the
    layers of each row.

    A row is loose once its next item does not fit as a whole. The best part of the rest that fits
    then waits in a heap until its value per byte is the highest left. Items that stay (they are
    held already, and are in the relaxation) have their bytes reserved at home until their turn.
    ``density``: the value per byte by which items are compared. The forest is changed.
    """
    begin, cum, value = points.begin, points.cum, points.value
    kinds, amounts, trees, node = on.kinds, on.amounts, on.trees, on.node
    n = len(rows.model)
    group, layers, older = np.full(n, -1), np.zeros(n, np.int64), np.full(n, -1)
    newest = np.full(len(points.kind), -1)
    loose = np.zeros(n, np.bool_)
    waiting = [(0.0, 0)]
    waiting.pop()
    for d in range(amounts.shape[1]):
        refresh(kinds, amounts, trees, node, d, 1)
    at = 0
    while at < len(order) or len(waiting) > 0:
        waited, promised, i = False, 0.0, 0
        if len(waiting) > 0 and (at == len(order) or -waiting[0][0] >= density[order[at]]):
            key, r = heapq.heappop(waiting)
            waited, promised = True, -key
        else:
            i = order[at]
            at += 1
            r = items.row[i]
        m = rows.model[r]
        lo, hi, kind, home, base = begin[m], begin[m + 1], points.kind[m], rows.home[r], group[r]
        w, stop = kinds[kind, WIDTH], layers[r]
        if not waited:
            if stays[i]:
                amounts[RESERVED, home : home + w] -= items.nbytes[i]
                here = base == home or (base < 0 and newest[m] < 0)
                if loose[r] or not here or least(amounts, home, w) < items.nbytes[i]:
                    refresh(kinds, amounts, trees, node, home, w)  # else refreshed below
            if loose[r]:
                continue
            stop = items.stop[i]
        if base < 0:  # a waiting row needs room for one layer only
            nbytes = float(cum[lo + (1 if waited else stop)])
            base = choose(kinds, amounts, trees, node, kind, home, newest[m], older, group, nbytes)
        left = _NOTHING if base < 0 else least(amounts, base, w)
        if waited:
            stop, slope = part(cum, value, lo, hi, layers[r], left)
            worth = slope * rows.need[r] / w
            if stop == layers[r]:
                continue
            if worth < promised * (1 - _SAME):  # room was taken since the row was pushed
                heapq.heappush(waiting, (-worth, r))
                continue
        elif left < cum[lo + stop] - cum[lo + layers[r]]:
            loose[r] = True
            heapq.heappush(waiting, (-density[i], r))
            continue
        amounts[LEFT, base : base + w] -= cum[lo + stop] - cum[lo + layers[r]]
        layers[r] = stop
        if group[r] < 0:
            group[r], older[r], newest[m] = base, newest[m], r
        refresh(kinds, amounts, trees, node, base, w)
        if waited:
            _, slope = part(cum, value, lo, hi, stop, least(amounts, base, w))
            if slope > 0.0:
                heapq.heappush(waiting, (-slope * rows.need[r] / w, r))
    return group, layers
