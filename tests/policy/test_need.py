"""Starts that are not predicted are cold; predicted starts that never happen waste memory."""

from __future__ import annotations

import heapq
import math
import random

import pytest

from warmserve_rt.policy.rates import RecentRate, start_rates


def counted(rate: float, service: float, batch: int, most: int) -> list[float]:
    """Simulate, and return the steps per second beyond 0, 1, ... batches of concurrent requests."""
    random_ = random.Random(1)
    ends: list[float] = []
    steps, now, horizon = [0] * most, 0.0, 40_000.0
    while (now := now + random_.expovariate(rate)) < horizon:
        while ends and ends[0] <= now:
            heapq.heappop(ends)
        level, beside = divmod(len(ends), batch)
        if not beside and level < most:
            steps[level] += 1
        heapq.heappush(ends, now + random_.expovariate(1 / service))
    return [step / horizon for step in steps]


@pytest.mark.parametrize(
    ("rate", "service", "batch"), [(0.2, 3.0, 32), (2.0, 2.0, 4), (1.0, 8.0, 8)]
)
def test_starts_are_those_of_a_simulation(rate: float, service: float, batch: int) -> None:
    wanted = counted(rate, service, batch, 3)
    found = start_rates(rate, rate * service, batch, 3)
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, rel=0.06, abs=1e-3)


def test_no_requests_give_no_starts() -> None:
    assert start_rates(0.0, 0.0, 32, 2) == [0.0, 0.0]
    first, second = start_rates(1e-9, 0.0, 32, 2)
    assert first == pytest.approx(1e-9)
    assert second == 0.0


def test_many_concurrent_requests_do_not_overflow() -> None:
    assert all(math.isfinite(each) for each in start_rates(1e4, 1e5, 32, 4))


def test_a_recent_rate_is_that_of_steady_arrivals_and_fades() -> None:
    recent = RecentRate(60.0)
    for i in range(1000):
        recent.arrived(0.5 * i)
    now = 0.5 * 999
    assert recent.at(now) == pytest.approx(2.0, rel=0.02)
    assert recent.at(now + 60) == pytest.approx(2.0 / math.e, rel=0.02)
    assert recent.at(now - 10) <= recent.at(now)  # a clock set back adds nothing
