"""Evaluate a few paired runs: means with 95 % intervals, differences, ratios, rates on a grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval. ``low`` and ``high`` are None for a single value, or if a
    value is not finite."""

    mean: float
    low: float | None = None
    high: float | None = None


@lru_cache
def t_quantile(degrees: int, confidence: float = CONFIDENCE) -> float:
    """Return the t for which Student's distribution has the probability ``confidence`` in [-t, t].

    Bisects the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4.

    Parameters
    ----------
    degrees
        The degrees of freedom.
    confidence
        The probability of the interval.

    Raises
    ------
    ValueError
        If there is less than one degree of freedom, or the confidence is not between 0 and 1.
    """
    if degrees < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"needs degrees of freedom >= 1 and 0 < confidence < 1, got {degrees} and {confidence}"
        )
    low, high = 0.0, 1.0
    while _within(high, degrees) < confidence:
        low, high = high, 2 * high
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return middle
        if _within(middle, degrees) < confidence:
            low = middle
        else:
            high = middle


def _within(t: float, degrees: int) -> float:
    """Return the probability of [-t, t]."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    for k in range(2 + odd, degrees - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + (math.sin(angle) * total if degrees > 1 else 0.0))


def interval(values: Sequence[float]) -> Interval:
    """Return the mean over seeds with mean -+ t s / sqrt(n). Raise ValueError for no values."""
    if not values:
        raise ValueError("no values to take a mean of")
    n = len(values)
    mean = math.fsum(values) / n if all(map(math.isfinite, values)) else _sum(values)
    if n == 1 or not math.isfinite(mean):
        return Interval(mean)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1))
    half = t_quantile(n - 1) * spread / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def _sum(values: Sequence[float]) -> float:
    """Return the sum: infinite if a value is infinite, NaN if a value is NaN."""
    return sum(values)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the mean of ours minus theirs, by seed. Raise ValueError if lengths differ.

    Parameters
    ----------
    ours, theirs
        The values of two policies, by seed.
    """
    return interval([a - b for a, b in zip(ours, theirs, strict=True)])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Return the geometric mean of ours over theirs, seed by seed, with the interval of its
    logarithm.

    The result is NaN without an interval if a value is not positive, or if both of a pair are
    infinite.

    Parameters
    ----------
    ours, theirs
        The values of two policies, by seed.

    Raises
    ------
    ValueError
        If the lengths differ.
    """
    pairs = list(zip(ours, theirs, strict=True))
    if not all(a > 0 and b > 0 and not (math.isinf(a) and math.isinf(b)) for a, b in pairs):
        return Interval(math.nan)
    logs = interval([_log(a) - _log(b) for a, b in pairs])
    if logs.low is None or logs.high is None:
        return Interval(_exp(logs.mean))
    return Interval(_exp(logs.mean), _exp(logs.low), _exp(logs.high))


def _log(value: float) -> float:
    return math.log(value) if math.isfinite(value) else value


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


@dataclass(frozen=True)
class HighestRate:
    """The highest rate on a grid whose attainment reaches a goal.

    ``rate``: that rate, or None if no rate reaches the goal. ``failing``: lower rates that miss the
    goal. Some exist because attainment is not monotone if memory is scarce.
    """

    goal: float
    rate: float | None
    failing: tuple[float, ...]


def highest_rate(rates: Sequence[float], attainment: Sequence[float], goal: float) -> HighestRate:
    """Return the highest rate of a grid.

    Parameters
    ----------
    rates
        The rates of the grid.
    attainment
        The mean over seeds of the share within the SLO, at each rate.
    goal
        The share to reach.
    """
    points = sorted(zip(rates, attainment, strict=True))
    reached = [rate for rate, share in points if share >= goal]
    if not reached:
        return HighestRate(goal, None, ())
    failing = tuple(rate for rate, share in points if rate < reached[-1] and share < goal)
    return HighestRate(goal, reached[-1], failing)
