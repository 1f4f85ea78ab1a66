"""Estimate how often a model needs another instance."""

from __future__ import annotations

import math

_LEAST = 1e-12


def start_rates(rate: float, concurrent: float, batch: int, most: int) -> list[float]:
    """Return the starts per second of a model's first, second, ... instance.

    If requests arrive at random and none waits, the number of concurrent requests is a Poisson
    variable (M/G/inf). It steps from n to n + 1 at the rate ``rate * P(n)``. Instance j + 1 starts
    when it steps beyond j batches.

    Parameters
    ----------
    rate
        Requests per second.
    concurrent
        The mean number of concurrent requests.
    batch
        The requests that one instance serves at once.
    most
        The number of instances to return.
    """
    if rate <= 0:
        return [0.0] * most
    mean = max(concurrent, _LEAST)
    return [
        rate * math.exp(j * batch * math.log(mean) - mean - math.lgamma(j * batch + 1))
        for j in range(most)
    ]


class RecentRate:
    """The recent requests per second of one model.

    A request's weight decays exponentially with its age: to 1/e after ``memory`` seconds.
    """

    __slots__ = ("last", "memory", "rate")

    def __init__(self, memory: float) -> None:
        self.memory, self.rate, self.last = memory, 0.0, 0.0

    def arrived(self, now: float) -> None:
        """Count a request that arrives ``now`` (seconds)."""
        self.rate = self.at(now) + 1.0 / self.memory
        self.last = now

    def at(self, now: float) -> float:
        """Return the rate at ``now`` (seconds)."""
        return self.rate * math.exp(min(0.0, self.last - now) / self.memory)
