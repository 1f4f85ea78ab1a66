"""A reference model of the exchanges of policy/improve.py, in plain Python, clear and slow."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from warmserve_rt.policy.curve import ValueCurve


@dataclass(eq=False)
class Held:
    model: int
    first: int
    layers: int
    fixed: bool
    use: float = 0.0


class Market:
    def __init__(
        self,
        curves: list[ValueCurve],
        need: list[float],
        held: list[Held],
        free: list[float],
        available: list[float],
        node: int,
        margin: float,
        most: int,
    ) -> None:
        self.curves, self.need, self.free = curves, need, free
        self.slots: list[Held | None] = [*held]  # a new copy takes the first free slot
        self.available, self.node, self.margin, self.most = available, node, margin, most
        for model in range(len(curves)):
            self.order(model)

    @property
    def held(self) -> list[Held]:
        return [held for held in self.slots if held]

    def width(self, held: Held) -> int:
        return self.curves[held.model].width

    def on(self, held: Held, device: int) -> bool:
        return held.first <= device < held.first + self.width(held)

    def size(self, model: int, low: int, high: int) -> float:
        cumulative = self.curves[model].cumulative
        return float(cumulative[high] - cumulative[low])

    def chance(self, first: int, width: int) -> float:
        return prod(self.available[first : first + width])

    def order(self, model: int) -> float:
        """Divide a model's starts among its copies, and return the share that finds none available.

        The copy with the most expected layers (layers times availability) serves starts first.
        """
        mine = [h for h in self.held if h.model == model]
        width, left = self.curves[model].width, 1.0
        for held in sorted(mine, key=lambda h: -h.layers * self.chance(h.first, width)):
            held.use = left * self.chance(held.first, width)
            left *= 1 - self.chance(held.first, width)
        return left

    def worth(self, model: int, low: int, high: int) -> float:
        """Return the seconds that a model's layers from ``low`` to ``high`` save."""
        value = self.curves[model].value
        return float(value[high] - value[low]) * self.need[model]

    def value(self) -> float:
        """Return the seconds that all held layers save."""
        return sum(self.worth(h.model, 0, h.layers) * h.use for h in self.held)

    def cut(self, held: Held, layers: int, lacking: float) -> int:
        """Return how many of the first ``layers`` layers to keep to free ``lacking`` bytes.

        The bytes are per device. The result is the largest such number, but at least the last stop
        below ``layers``.
        """
        stops = self.curves[held.model].stops.tolist()
        stop = max([0, *(stop for stop in stops if stop < layers)])
        keep = layers
        while keep > stop and self.size(held.model, keep, layers) < lacking:
            keep -= 1
        return keep

    def price(self, held: Held, layers: int, lacking: float) -> tuple[float, float, int]:
        """Return the price of dropping a copy's tail to free ``lacking`` bytes.

        The result is the seconds lost per wanted byte, the seconds lost in all, and the number of
        layers left.
        """
        left = self.cut(held, layers, lacking)
        gone = self.worth(held.model, left, layers) * held.use
        return gone / min(self.size(held.model, left, layers), lacking), gone, left

    def victims(
        self, first: int, width: int, more: float, worth: float, own: Held | None
    ) -> tuple[dict[Held, int], float] | None:
        chosen: dict[Held, int] = {}
        lost = 0.0
        for device in range(first, first + width):
            lacking = more - self.free[device]
            if lacking <= 0:
                continue
            for held, left in chosen.items():
                if self.on(held, device):
                    lacking -= self.size(held.model, left, held.layers)
            while lacking > 0:
                there = [
                    h
                    for h in self.held
                    if self.on(h, device) and not h.fixed and h is not own
                    if chosen.get(h, h.layers) > 0
                ]
                if not there:
                    return None

                offers = [(*self.price(h, chosen.get(h, h.layers), lacking), h) for h in there]
                _, gone, left, victim = min(offers, key=lambda offer: offer[0])
                lost += gone
                if lost >= worth:
                    return None
                lacking -= self.size(victim.model, left, chosen.get(victim, victim.layers))
                chosen[victim] = left
        return chosen, lost

    def crowding(self, first: int, width: int, more: float) -> float:
        """Return the bytes that wider copies lose if ``more`` bytes on each device are taken."""
        lost, wide = 0.0, 2 * width
        while wide <= self.node:
            begin = first // wide * wide
            if begin // self.node == (begin + wide - 1) // self.node:
                before = self.free[begin : begin + wide]
                after = [
                    free - more * (first <= device < first + width)
                    for device, free in enumerate(before, begin)
                ]
                lost += wide * (min(before) - min(after))
            wide *= 2
        return lost

    def spend(self, first: int, width: int, more: float) -> None:
        for device in range(first, first + width):
            self.free[device] -= more

    def offers(self) -> list[tuple[float, float, float, int, Held | None, int]]:
        """Return the possible growths, densest first.

        Each is (gain per byte and device, gain, bytes per device, model, the copy that grows or
        None for a new copy, layers after the growth).
        """
        found: list[tuple[float, float, float, int, Held | None, int]] = []
        growing: list[tuple[int, int, float, Held | None]] = [
            (h.model, h.layers, h.use, h) for h in self.held if not h.fixed
        ]
        for model, curve in enumerate(self.curves):
            mine = sum(h.model == model for h in self.held)
            if mine < min(self.most, len(self.free) // curve.width):
                growing.append((model, 0, self.order(model), None))
        for model, layers, use, held in growing:
            for end in self.curves[model].stops.tolist():
                gain = self.worth(model, layers, end) * use if end > layers else 0.0
                if gain > 0:
                    size = self.size(model, layers, end)
                    density = gain / size / self.curves[model].width
                    found.append((density, gain, size, model, held, end))
        return sorted(found, key=lambda offer: -offer[0])

    def move(self) -> bool:
        for _, gain, more, model, own, end in self.offers():
            width = self.curves[model].width
            if own is not None:
                got = self.victims(own.first, width, more, gain / (1 + self.margin), own)
                if got is None:
                    continue
                self.settle(got[0])
                own.layers = end
                self.spend(own.first, width, more)
                self.order(model)
                return True
            best, net, rank = None, 0.0, (0.0, 0.0)
            for first in range(0, len(self.free) - width + 1, width):
                if first // self.node != (first + width - 1) // self.node:
                    continue
                worth = gain * self.chance(first, width)
                if worth < net or any(h.model == model and h.first == first for h in self.held):
                    continue
                got = self.victims(first, width, more, worth / (1 + self.margin), None)
                if got is None:
                    continue
                gained = worth - (1 + self.margin) * got[1]
                mine = (-self.crowding(first, width, more), min(self.free[first : first + width]))
                if gained > net or (gained == net > 0 and mine > rank):
                    best, net, rank = (first, got[0]), gained, mine
            if best is not None:
                self.slots += [None]
                self.slots[self.slots.index(None)] = Held(model, best[0], end, False)
                self.settle(best[1])
                self.spend(best[0], width, more)
                self.order(model)
                return True
        return False

    def settle(self, victims: dict[Held, int]) -> None:
        for victim, left in victims.items():
            freed = self.size(victim.model, left, victim.layers)
            self.spend(victim.first, self.width(victim), -freed)
            victim.layers = left
            if not left:
                self.slots[self.slots.index(victim)] = None
            self.order(victim.model)
