"""The group of devices that a new copy takes."""

from __future__ import annotations

import numpy as np

from ._arrays import F64, I64
from ._compiled import jit
from ._copies import Copies, Devices, Models, chance
from ._victims import room_costs, victims


@jit
def least_free(free: F64, first: int, width: int) -> float:
    """Return the free bytes of the device of a group that has fewest."""
    least = np.inf
    for d in range(first, first + width):
        least = min(least, free[d])
    return least


@jit
def crowding(free: F64, first: int, width: int, more: float, node: int) -> float:
    """Return the bytes that wider copies lose if ``more`` bytes on every device of a group are
    taken.

    A wider group of w devices has room for w times the fewest free bytes of any of its devices. The
    result sums the losses of the groups around this one that are 2, 4, 8, ... times as wide.
    """
    left = least_free(free, first, width) - more
    lost, wide = 0.0, 2 * width
    while wide <= node:
        begin = first // wide * wide
        end = begin + wide
        if end <= len(free) and begin // node == (end - 1) // node:
            lost += wide * max(least_free(free, begin, wide) - left, 0.0)
        wide *= 2
    return lost


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

    Among equals prefer the group whose choice leaves wider copies most room, and then the one with
    most free bytes, because copies are extended where they are and move nowhere.

    Consider groups that changed in an exchange after ``since``. Write the victims to ``best_rows``
    and ``best_left``. Return the first device of the group, or -1, and the number of victims.
    """
    width = models.width[m]
    place, found, net, least, most = -1, 0, 0.0, np.inf, -np.inf
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
        bound = worth - (1 + margin) * costs
        if costs >= worth / (1 + margin) or bound < net:
            continue
        crowds = crowding(devices.free, first, width, more, node)
        room = least_free(devices.free, first, width)
        better = crowds < least or (crowds == least and room > most)
        if bound == net and not better:
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
        if got >= 0 and (gained > net or (gained == net > 0 and better)):
            net, place, found, least, most = gained, first, got, crowds, room
            best_rows[:got], best_left[:got] = rows[:got], left[:got]
    return place, found
