"""Choose the devices on which an instance starts, by the time that the start and other starts
lose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Sets of devices are bit masks: bit d stands for device d.


@dataclass(frozen=True)
class Start:
    """A start of a model that is expected with the probability ``need``.

    Device d holds layers of rank ``d % width`` only. As this rank, with its resident layers, it is
    ready in ``seconds[d]``. As any other rank, or without layers, it is ready in ``cold`` seconds.
    """

    need: float
    width: int
    cold: float
    seconds: Sequence[float]

    def cost(self, free: int, node: int, wait: float) -> float:
        """Return the seconds until the best start on these devices is ready.

        The slowest device of a start decides.

        Parameters
        ----------
        free
            The free devices, as a mask.
        node
            The number of devices of a node.
        wait
            Seconds until other devices become free; added if too few are free.
        """
        best = self.cold + wait
        every = (1 << node) - 1
        for first in range(0, len(self.seconds), node):
            inside = free >> first & every
            if inside.bit_count() < self.width:
                continue
            slowest = 0.0
            for rank in range(self.width):
                least = self.cold
                for d in range(first + rank, first + node, self.width):
                    if free >> d & 1 and self.seconds[d] < least:
                        least = self.seconds[d]
                if least > slowest:
                    slowest = least
            if slowest < best:
                best = slowest
        return best


def groups(start: Start, free: int, node: int) -> Iterator[tuple[float, tuple[int, ...]]]:
    """Yield candidate groups for a start: the seconds until it is ready, and the devices in the
    order of their ranks.

    The candidates are every free aligned group and, in each node, the fastest free device of each
    rank. If a rank has no free device, another free device of the node stands in for it.
    """
    width = start.width
    for first in range(0, len(start.seconds), node):
        inside = [d for d in range(first, first + node) if free >> d & 1]
        if len(inside) < width:
            continue
        for base in range(first, first + node - width + 1, width):
            group = tuple(range(base, base + width))
            if all(free >> d & 1 for d in group):
                yield max(start.seconds[d] for d in group), group
        if width == 1:
            continue
        of_rank: list[int | None] = [
            min(
                (d for d in inside if d % width == rank),
                key=lambda d: start.seconds[d],
                default=None,
            )
            for rank in range(width)
        ]
        others = [d for d in inside if d not in of_rank]
        if None in of_rank:
            yield start.cold, tuple(others.pop() if d is None else d for d in of_rank)
        else:
            yield (
                max(start.seconds[d] for d in of_rank if d is not None),
                tuple(d for d in of_rank if d is not None),
            )


def start_group(
    start: Start, free: int, node: int, rivals: Sequence[Start], wait: float
) -> tuple[int, ...] | None:
    """Return the devices to take, in the order of their ranks, or None if too few are free.

    The cost of a group is the seconds until the start is ready plus the expected loss of the
    rivals: for each rival, its need times the seconds by which its own start would be later without
    these devices. The first group of the lowest cost is chosen.

    Parameters
    ----------
    start
        The start to place.
    free
        The free devices, as a mask.
    node
        The number of devices of a node.
    rivals
        Starts of other models that may need the same devices.
    wait
        Seconds until other devices become free.
    """
    before = [rival.cost(free, node, wait) for rival in rivals]
    best, least = None, float("inf")
    for seconds, group in sorted(groups(start, free, node)):
        cost = seconds
        left = free
        for d in group:
            left &= ~(1 << d)
        for rival, now in zip(rivals, before, strict=True):
            if cost >= least:
                break
            cost += rival.need * (rival.cost(left, node, wait) - now)
        if cost < least:
            best, least = group, cost
    return best
