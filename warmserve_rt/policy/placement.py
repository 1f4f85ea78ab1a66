"""Where an instance starts: on the devices whose use costs least, itself and the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Sets of devices are masks: bit d is device d.


@dataclass(frozen=True)
class Start:
    """A start of a model that will come or may come, with the probability ``need``.

    Device d can hold the layers of rank ``d % width`` alone, and with those that are there now it
    is ready in ``seconds[d]``; as any other rank, or with none, in ``cold`` seconds.
    """

    need: float
    width: int
    cold: float
    seconds: Sequence[float]

    def cost(self, free: int, node: int, wait: float) -> float:
        """Of the best start on these free devices of nodes of ``node`` devices, which its slowest
        device decides; ``wait`` seconds more where they are too few."""
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
    """Devices for a start, in the order of their ranks, with the seconds until it is ready: every
    aligned group that is free, in each node the fastest device of each rank, and, where some rank
    has none, any that are left for it."""
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
    """The devices to take, in the order of their ranks, or None where too few are free.

    To the seconds until it is ready comes what the others lose: for each rival, its need times the
    seconds by which its own start would be later without these devices. Of equals the first.
    ``wait``: seconds until others become free.
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
