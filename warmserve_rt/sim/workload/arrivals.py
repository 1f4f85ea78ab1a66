"""Draw the requests of one model: replays of a trace, and renewal processes."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .traces import Trace

DAY = 86400.0
PAST_DAYS = 7
MAX_CV = 30.0  # the intervals of a Gamma process with a larger cv underflow

Floats = NDArray[np.float64]


class Replay:
    """A trace that is repeated at another rate.

    The smallest sufficient number of rotations of the trace (``copies``) is taken, each by its own
    offset. Each request is kept with the probability ``keep``, so that the rotations have ``rate``
    together. Thinning by p turns an index of dispersion D into 1 + p (D - 1), so that bursts
    remain.

    Parameters
    ----------
    trace
        The trace.
    rate
        Requests per second.
    rng
        The source of offsets and draws.
    """

    def __init__(self, trace: Trace, rate: float, rng: np.random.Generator) -> None:
        self.trace = trace
        self.copies = max(1, math.ceil(rate / trace.rate))
        self.keep = rate / (self.copies * trace.rate)
        self._offsets = rng.uniform(0, trace.duration, self.copies)
        self._rng = rng

    def run(self, duration: float) -> tuple[Floats, NDArray[np.int64]]:
        """Return times in [0, duration), ascending, and the rows of the trace. If the trace was
        recorded in steps, times are spread evenly over each step."""
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
        """Return the number of requests in the windows of the past days, oldest first.

        The same rotations are used with new draws. Every past day therefore has, from the run's
        time of day on, the rates that the run has from 0 on.
        """
        edges = np.arange(round(DAY / window) + 1) * window
        total = np.zeros((PAST_DAYS, len(edges) - 1), np.int64)
        for offset in self._offsets:
            cycles, position = np.divmod(edges + offset, self.trace.duration)
            passed = cycles * len(self.trace.time) + np.searchsorted(self.trace.time, position)
            counts = np.diff(passed).astype(np.int64)
            total += self._rng.binomial(counts, self.keep, size=total.shape)
        return total.ravel()

    def dispersion(self, scale: float, window: float) -> float:
        """Return variance over mean of the number of requests in ``scale`` seconds, relative to
        the mean of their window.

        Parameters
        ----------
        scale
            Seconds of the intervals in which requests are counted.
        window
            Seconds of a window.
        """
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
    """Return the arrival times, ascending, of a renewal process in consecutive windows.

    The intervals between the ``counts[w]`` arrivals of window w are draws from a Gamma or a Weibull
    distribution with the coefficient of variation ``cvs[w]``. They are scaled so that they form a
    circle as long as the window. The circle is then rotated at random, so that no moment of the
    window is special.

    Parameters
    ----------
    counts
        The number of arrivals of each window.
    cvs
        The coefficient of variation of each window.
    weibull
        Whether the distribution of each window is Weibull; otherwise it is Gamma.
    window
        Seconds of a window.
    rng
        The source of draws.
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
    # If all intervals underflow to 0, one of them becomes the whole circle.
    empty = np.maximum.reduceat(gap, first) == 0
    gap[first[empty]] = 1.0
    total = np.add.reduceat(gap, first)
    gap /= total[of]
    end = np.cumsum(gap)
    place = end - (end - gap)[first][of] + rng.random(len(counts))[of]
    start = np.flatnonzero(busy) * window
    # Rounding must not move an arrival into the next window.
    inside = np.minimum(place % 1.0, 1 - 1e-12) * window
    return np.sort(start[of] + inside)


def divide_windows(
    counts: NDArray[np.int64], cvs: Floats, parts: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Divide the requests of each window among ``parts`` equal parts of it: [windows * parts].

    The counts of a renewal process vary cv^2 times as much as those of a Poisson process. A
    Dirichlet multinomial with a total concentration of (n - cv^2) / (cv^2 - 1) has this variance.

    Parameters
    ----------
    counts
        The number of requests of each window.
    cvs
        The coefficient of variation of each window.
    parts
        The number of parts of each window.
    rng
        The source of draws.
    """
    excess = np.maximum(cvs**2 - 1, 1e-6)
    concentration = np.clip((counts - cvs**2) / excess, 1e-2, 1e6) / parts
    weights = rng.standard_gamma(np.repeat(concentration[:, None], parts, axis=1)) + 1e-300
    weights /= weights.sum(axis=1, keepdims=True)
    return rng.multinomial(counts, weights).ravel()


def _weibull_shape(cvs: Floats) -> Floats:
    """Return the shape k of Weibull distributions: cv^2 = Gamma(1 + 2/k) / Gamma(1 + 1/k)^2 - 1."""
    shapes = np.geomspace(0.17, 30, 400)
    squared = [math.exp(math.lgamma(1 + 2 / k) - 2 * math.lgamma(1 + 1 / k)) - 1 for k in shapes]
    known = np.log(np.sqrt(squared))[::-1]
    return np.exp(np.interp(np.log(cvs), known, np.log(shapes)[::-1]))
