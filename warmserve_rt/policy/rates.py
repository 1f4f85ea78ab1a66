"""How often a model will need another instance."""

from __future__ import annotations

import math

_LEAST = 1e-12


def start_rates(rate: float, concurrent: float, batch: int, most: int) -> list[float]:
    """Starts a second of the first, second, ... instance of a model, at most ``most`` of them.

    ``rate``: its requests a second, ``concurrent``: their mean number. While requests come at
    random and none waits, that number is a Poisson variable (M/G/inf), which steps from n to
    n + 1 at the
    rate ``rate * P(n)``; instance j + 1 starts when it steps beyond j batches.
    """
    if rate <= 0:
        return [0.0] * most
    mean = max(concurrent, _LEAST)
    return [
        rate * math.exp(j * batch * math.log(mean) - mean - math.lgamma(j * batch + 1))
        for j in range(most)
    ]


class RecentRate:
    """Requests a second of one model lately: each counts less the longer it is ago, a third after
    ``memory`` seconds."""

    __slots__ = ("last", "memory", "rate")

    def __init__(self, memory: float) -> None:
        self.memory, self.rate, self.last = memory, 0.0, 0.0

    def arrived(self, now: float) -> None:
        self.rate = self.at(now) + 1.0 / self.memory
        self.last = now

    def at(self, now: float) -> float:
        return self.rate * math.exp(min(0.0, self.last - now) / self.memory)
