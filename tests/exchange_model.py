"""The exchanges of policy/improve.py, in plain Python and without haste."""

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
        self.slots: list[Held | None] = [*held]  # what comes takes the first free one
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

    def nbytes(self, model: int, layers: int) -> float:
        return float(self.curves[model].cumulative[layers])

    def chance(self, first: int, width: int) -> float:
        return prod(self.available[first : first + width])

    def order(self, model: int) -> float:
        """Shares out the starts; what is left finds no group that holds something."""
        mine = [h for h in self.held if h.model == model]
        width, left = self.curves[model].width, 1.0
        for held in sorted(mine, key=lambda h: -h.layers * self.chance(h.first, width)):
            held.use = left * self.chance(held.first, width)
            left *= 1 - self.chance(held.first, width)
        return left

    def tail(self, held: Held, layers: int) -> tuple[float, int]:
        """Of the last segment of so many layers: seconds lost for a byte on each device, and the
        layers before it."""
        curve = self.curves[held.model]
        before = max(k for k in curve.knots.tolist() if k < layers or k == 0)
        gone = float(curve.value[layers] - curve.value[before])
        size = self.nbytes(held.model, layers) - self.nbytes(held.model, before)
        return gone * self.need[held.model] * held.use / max(size, 1.0), before

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
                    lacking -= self.nbytes(held.model, held.layers) - self.nbytes(held.model, left)
            while lacking > 0:
                there = [
                    h
                    for h in self.held
                    if self.on(h, device) and not h.fixed and h is not own
                    if chosen.get(h, h.layers) > 0
                ]
                if not there:
                    return None
                victim = min(there, key=lambda h: self.tail(h, chosen.get(h, h.layers))[0])
                have = chosen.get(victim, victim.layers)
                per_byte, before = self.tail(victim, have)
                left = have
                while left > before and (
                    self.nbytes(victim.model, have) - self.nbytes(victim.model, left) < lacking
                ):
                    left -= 1
                freed = self.nbytes(victim.model, have) - self.nbytes(victim.model, left)
                lost += per_byte * freed
                if lost >= worth:
                    return None
                chosen[victim] = left
                lacking -= freed
        return chosen, lost

    def spend(self, first: int, width: int, more: float) -> None:
        for device in range(first, first + width):
            self.free[device] -= more

    def offers(self) -> list[tuple[float, float, float, int, Held | None, int]]:
        """Density, gain, bytes, model, what grows (or None: a new copy), layers then."""
        found: list[tuple[float, float, float, int, Held | None, int]] = []
        for held in self.held:
            curve, need = self.curves[held.model], self.need[held.model]
            more = [k for k in curve.knots.tolist() if k > held.layers]
            if held.fixed or need <= 0 or not more:
                continue
            gain = need * held.use * float(curve.value[more[0]] - curve.value[held.layers])
            size = self.nbytes(held.model, more[0]) - self.nbytes(held.model, held.layers)
            if gain > 0:
                found.append((gain / size / curve.width, gain, size, held.model, held, more[0]))
        for model, curve in enumerate(self.curves):
            mine = sum(h.model == model for h in self.held)
            if self.need[model] <= 0 or len(curve.knots) < 2:
                continue
            if mine >= min(self.most, len(self.free) // curve.width):
                continue
            end = int(curve.knots[1])
            gain = self.need[model] * self.order(model) * float(curve.value[end])
            size = self.nbytes(model, end)
            if gain > 0:
                found.append((gain / size / curve.width, gain, size, model, None, end))
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
            best, net = None, 0.0
            for first in range(0, len(self.free) - width + 1, width):
                if first // self.node != (first + width - 1) // self.node:
                    continue
                worth = gain * self.chance(first, width)
                if worth <= net or any(h.model == model and h.first == first for h in self.held):
                    continue
                got = self.victims(first, width, more, worth / (1 + self.margin), None)
                if got is not None and worth - (1 + self.margin) * got[1] > net:
                    best, net = (first, got[0]), worth - (1 + self.margin) * got[1]
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
            freed = self.nbytes(victim.model, victim.layers) - self.nbytes(victim.model, left)
            self.spend(victim.first, self.width(victim), -freed)
            victim.layers = left
            if not left:
                self.slots[self.slots.index(victim)] = None
            self.order(victim.model)
