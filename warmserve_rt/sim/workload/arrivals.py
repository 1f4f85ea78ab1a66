"""How requests of one model are drawn: replays of a trace, and renewal processes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .traces import Trace

DAY = 86400.0
PAST_DAYS = 7
MAX_CV = 30.0  # beyond, the intervals of a Gamma process underflow

Floats = NDArray[np.float64]


class Replay:
    """A trace, over and over, at another rate.

    ``copies`` rotations of the trace, each by an offset of its own and each request kept with
    probability ``keep``, have ``rate`` together: as few rotations as can. Thinning by p turns an
    index of dispersion D into 1 + p (D - 1), so what bursts goes on bursting.
    """

    def __init__(self, trace: Trace, rate: float, rng: np.random.Generator) -> None:
        self.trace = trace
        self.copies = max(1, math.ceil(rate / trace.rate))
        self.keep = rate / (self.copies * trace.rate)
        self._offsets = rng.uniform(0, trace.duration, self.copies)
        self._rng = rng

    def run(self, duration: float) -> tuple[Floats, NDArray[np.int64]]:
        """Times in [0, duration), ascending, and rows of the trace. What was recorded in steps is
        spread evenly over them."""
        times, rows = [], []
        period = self.trace.duration
        for offset in self._offsets:
            for cycle in range(math.ceil((duration + offset) / period)):
                time = self.trace.time + (cycle * period - offset)
                if self.trace.step:
                    time += self._rng.random(len(time)) * self.trace.step
                kept = np.flatnonzero(self._rng.random(len(time)) < self.keep)
                kept = kept[(time[kept] >= 0) & (time[kept] < duration)]
                times.append(time[kept])
                rows.append(kept)
        time, row = np.concatenate(times), np.concatenate(rows)
        order = np.argsort(time, kind="stable")
        return time[order], row[order]

    def history(self, window: float) -> NDArray[np.int64]:
        """Requests in the windows of the past days, oldest first. The same rotations, each kept by
        new draws, give every day from the run's time of day on what the run has from 0 on."""
        edges = np.arange(round(DAY / window) + 1) * window
        total = np.zeros((PAST_DAYS, len(edges) - 1), np.int64)
        for offset in self._offsets:
            cycles, position = np.divmod(edges + offset, self.trace.duration)
            passed = cycles * len(self.trace.time) + np.searchsorted(self.trace.time, position)
            counts = np.diff(passed).astype(np.int64)
            total += self._rng.binomial(counts, self.keep, size=total.shape)
        return total.ravel()

    def dispersion(self, scale: float, window: float) -> float:
        """Variance over mean of the number of requests in ``scale`` seconds, about the mean of
        their window."""
        bins = max(1, round(window / scale))
        windows = math.floor(self.trace.duration / window) or 1
        inside = self.trace.time[self.trace.time < windows * window]
        cells = (inside * (bins / window)).astype(np.int64)
        counts = np.bincount(cells, minlength=windows * bins)[: windows * bins]
        spread = counts.reshape(windows, bins).var(axis=1).mean() / max(counts.mean(), 1e-9)
        return float(max(1.0, 1 + self.keep * (spread - 1)))


def renewal(
    counts: NDArray[np.int64],
    cvs: Floats,
    weibull: NDArray[np.bool_],
    window: float,
    rng: np.random.Generator,
) -> Floats:
    """Arrivals of a renewal process in consecutive windows, given how many each has: ascending.

    The intervals between the ``counts[w]`` arrivals of window w are draws from a Gamma or a Weibull
    distribution with coefficient of variation ``cvs[w]``, scaled so that they close a circle as
    long as the window, which is then turned at random: no moment of the window is special.
    """
    busy = counts > 0
    counts, cvs, weibull = counts[busy], np.clip(cvs[busy], 0.05, MAX_CV), weibull[busy]
    if not len(counts):
        return np.zeros(0)
    of = np.repeat(np.arange(len(counts)), counts)
    gap = np.empty(len(of))
    heavy = weibull[of]
    gap[~heavy] = rng.standard_gamma(cvs[of[~heavy]] ** -2)
    gap[heavy] = rng.standard_exponential(int(heavy.sum())) ** (1 / _weibull_shape(cvs)[of[heavy]])
    first = np.cumsum(counts) - counts
    # All may underflow to 0: then one, any one, is the whole circle.
    empty = np.maximum.reduceat(gap, first) == 0
    gap[first[empty]] = 1.0
    total = np.add.reduceat(gap, first)
    gap /= total[of]
    end = np.cumsum(gap)
    place = end - (end - gap)[first][of] + rng.random(len(counts))[of]
    start = np.flatnonzero(busy) * window
    # Rounding must not carry an arrival into the window after.
    inside = np.minimum(place % 1.0, 1 - 1e-12) * window
    return np.sort(start[of] + inside)


def divided(
    counts: NDArray[np.int64], cvs: Floats, parts: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Divides each window's requests among ``parts`` equal parts of it: [windows * parts].

    A renewal process's counts vary by cv^2 times what a Poisson process's do; a Dirichlet
    multinomial with a total concentration of (n - cv^2) / (cv^2 - 1) has just that variance.
    """
    excess = np.maximum(cvs**2 - 1, 1e-6)
    concentration = np.clip((counts - cvs**2) / excess, 1e-2, 1e6) / parts
    weights = rng.standard_gamma(np.repeat(concentration[:, None], parts, axis=1)) + 1e-300
    weights /= weights.sum(axis=1, keepdims=True)
    return rng.multinomial(counts, weights).ravel()


def _weibull_shape(cvs: Floats) -> Floats:
    """The shape k of a Weibull distribution: cv^2 = Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 - 1."""
    shapes = np.geomspace(0.17, 30, 400)
    squared = [math.exp(math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k)) - 1 for k in shapes]
    known = np.log(np.sqrt(squared))[::-1]
    return np.exp(np.interp(np.log(cvs), known, np.log(shapes)[::-1]))
