"""The compiled loops of the residency planner.

All loops are in one file, because the compiler's cache checks the date of the file that contains
the called function, and not those of the functions it calls.

A model is a row of points: those of model m begin at ``begin[m]``, one for each number of leading
layers from 0 on, with the cumulative bytes on each device (``cum``) and the value of holding them
(``value``). A kind is one of the distinct widths. ``kinds`` [K, 4] has its width, its number of
aligned groups, and the number of leaves and the first node of its trees. ``amounts`` [3, D] has the
bytes left on each device, the reserved bytes, and the availability. ``trees`` [3, nodes] has three
maximum trees over the groups of each kind: FREE, the fewest bytes left on any device of the group;
CLEAR, the same without reserved bytes; WANTED, CLEAR times the lowest availability in the group.
"""

from __future__ import annotations

import heapq
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from ._compiled import entry as _entry
from ._compiled import inner as _inner

I64: TypeAlias = npt.NDArray[np.int64]
F64: TypeAlias = npt.NDArray[np.float64]
Bools: TypeAlias = npt.NDArray[np.bool_]

WIDTH, COUNT, LEAVES, FIRST = 0, 1, 2, 3
LEFT, RESERVED, AVAILABLE = 0, 1, 2
FREE, CLEAR, WANTED = 0, 1, 2
_SAME = 1e-9  # relative: slopes that differ by less count as equal; the difference is rounding
_NOTHING = -np.inf


@_inner
def upper_hull(cum: I64, value: F64, out: I64) -> int:
    """Write the corners of the least concave function above the points to ``out``, as indices.
    Return their number.

    The function ends where the value first reaches its maximum. Equal slopes are merged.
    """
    last = len(cum) - 1
    top = value[last] * (1 - 1e-12)
    while last > 0 and value[last - 1] >= top:
        last -= 1
    count = 0
    for k in range(last + 1):
        while count >= 2:
            a, b = out[count - 2], out[count - 1]
            before = (value[b] - value[a]) / (cum[b] - cum[a])
            after = (value[k] - value[b]) / (cum[k] - cum[b])
            if before > after * (1 + _SAME):
                break
            count -= 1
        out[count] = k
        count += 1
    return count


@_entry
def hulls(begin: I64, cum: I64, value: F64, room: F64) -> tuple[I64, I64]:
    """Return the corners of every model's hull over the points with at most ``room`` bytes.

    The first array has the corners as numbers of layers, one model after another; the second has
    the index at which each model's corners begin.
    """
    knots, ends = np.empty(len(cum), np.int64), np.zeros(len(begin), np.int64)
    for m in range(len(begin) - 1):
        lo, hi, at = begin[m], begin[m + 1], ends[m]
        while cum[hi - 1] > room[m]:
            hi -= 1
        ends[m + 1] = at + upper_hull(cum[lo:hi], value[lo:hi], knots[at:])
    return knots[: ends[-1]].copy(), ends


@_entry
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


@_inner
def least(amounts: F64, base: int, width: int) -> float:
    """Return the fewest bytes left on any device of a group."""
    found: float = amounts[LEFT, base]
    for d in range(base + 1, base + width):
        found = min(found, amounts[LEFT, d])
    return found


@_inner
def rise(trees: F64, tree: int, first: int, place: int) -> None:
    """Update the nodes above a leaf."""
    while place > 1:
        place //= 2
        most = max(trees[tree, first + 2 * place], trees[tree, first + 2 * place + 1])
        if trees[tree, first + place] == most:
            return
        trees[tree, first + place] = most


@_inner
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


@_inner
def best(kinds: I64, trees: F64, tree: int, kind: int) -> int:
    """Return the highest leaf, the first of equals."""
    place, first = 1, int(kinds[kind, FIRST])
    while place < kinds[kind, LEAVES]:
        place *= 2
        if trees[tree, first + place] < trees[tree, first + place + 1]:
            place += 1
    return first + place


@_inner
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


@_inner
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


@_entry
def walk(
    order: I64,
    item_row: I64,
    item_stop: I64,
    item_bytes: F64,
    item_density: F64,
    item_stays: Bools,
    row_model: I64,
    row_need: F64,
    row_home: I64,
    begin: I64,
    cum: I64,
    value: F64,
    model_kind: I64,
    kinds: I64,
    amounts: F64,
    trees: F64,
    node: int,
) -> tuple[I64, I64]:
    """Run the greedy over the items in ``order``; return the group (first device or -1) and the
    layers of each row.

    A row is loose once its next item does not fit as a whole. The best part of the rest that fits
    then waits in a heap until its value per byte is the highest left. Items that stay (they are
    held already, and are in the relaxation) have their bytes reserved at home until their turn.
    ``amounts`` and ``trees`` are changed.
    """
    n = len(row_model)
    group, layers, older = np.full(n, -1), np.zeros(n, np.int64), np.full(n, -1)
    newest = np.full(len(model_kind), -1)
    loose = np.zeros(n, np.bool_)
    waiting = [(0.0, 0)]
    waiting.pop()
    for d in range(amounts.shape[1]):
        refresh(kinds, amounts, trees, node, d, 1)
    at = 0
    while at < len(order) or len(waiting) > 0:
        waited, promised, i = False, 0.0, 0
        if len(waiting) > 0 and (at == len(order) or -waiting[0][0] >= item_density[order[at]]):
            key, r = heapq.heappop(waiting)
            waited, promised = True, -key
        else:
            i = order[at]
            at += 1
            r = item_row[i]
        m = row_model[r]
        lo, hi, kind, home, base = begin[m], begin[m + 1], model_kind[m], row_home[r], group[r]
        w, stop = kinds[kind, WIDTH], layers[r]
        if not waited:
            if item_stays[i]:
                amounts[RESERVED, home : home + w] -= item_bytes[i]
                here = base == home or (base < 0 and newest[m] < 0)
                if loose[r] or not here or least(amounts, home, w) < item_bytes[i]:
                    refresh(kinds, amounts, trees, node, home, w)  # else refreshed below
            if loose[r]:
                continue
            stop = item_stop[i]
        if base < 0:  # a waiting row needs room for one layer only
            nbytes = float(cum[lo + (1 if waited else stop)])
            base = choose(kinds, amounts, trees, node, kind, home, newest[m], older, group, nbytes)
        left = _NOTHING if base < 0 else least(amounts, base, w)
        if waited:
            stop, slope = part(cum, value, lo, hi, layers[r], left)
            density = slope * row_need[r] / w
            if stop == layers[r]:
                continue
            if density < promised * (1 - _SAME):  # room was taken since the row was pushed
                heapq.heappush(waiting, (-density, r))
                continue
        elif left < cum[lo + stop] - cum[lo + layers[r]]:
            loose[r] = True
            heapq.heappush(waiting, (-item_density[i], r))
            continue
        amounts[LEFT, base : base + w] -= cum[lo + stop] - cum[lo + layers[r]]
        layers[r] = stop
        if group[r] < 0:
            group[r], older[r], newest[m] = base, newest[m], r
        refresh(kinds, amounts, trees, node, base, w)
        if waited:
            _, slope = part(cum, value, lo, hi, stop, least(amounts, base, w))
            if slope > 0.0:
                heapq.heappush(waiting, (-slope * row_need[r] / w, r))
    return group, layers
