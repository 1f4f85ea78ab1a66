"""Requests in order of time, and what was known of them before: what a simulation serves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from warmserve_rt.policy.profile import ModelProfile

from .arrivals import DAY, Floats

Ints = NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class Workload:
    """Requests in order of time, and what was known of them before.

    ``time`` float64[n] seconds in [0, ``duration``), ascending; ``model`` int32[n] indexes
    ``models``; ``prompt`` and ``output`` int32[n] tokens, the latter at least 1. ``history``
    float64[windows, models]: requests per second in the windows of ``history_window`` seconds that
    end at time 0, oldest first, NaN where the recording has a gap; there may be no windows.
    ``service`` float64[models]: mean seconds of a request served alone, over the source of the
    requests, not over these. ``dispersion`` float64[windows, models]: variance over mean of the
    number of requests in intervals about as long as ``service``.
    """

    name: str
    models: tuple[ModelProfile, ...]
    time: Floats
    model: Ints
    prompt: Ints
    output: Ints
    duration: float
    history_window: float
    history: Floats
    service: Floats
    dispersion: Floats

    def concurrency_history(self) -> tuple[Floats, Floats]:
        """Average and peak number of concurrent requests, each [windows, models], NaN in gaps.

        The average is Little's law: rate times mean service time, a = r s. With unlimited servers
        and Poisson arrivals the concurrency is Poisson of mean a; a dispersion of D makes its
        variance D a. It passes a level z standard deviations above the mean upwards as often as a
        request comes while it is there: (a / s) phi(z) / sqrt(D a) times a second (Rice). The peak
        of a window of w seconds is the level that it passes once,
        z = sqrt(2 log(w sqrt(a / D) / (s sqrt(2 pi)))), that is a + z sqrt(D a) and, for the skew
        of the distribution, D (z^2 - 1) / 6 (Cornish and Fisher). It is at least a, and at most a
        and all of the window's requests.
        """
        average = self.history * self.service
        spread = self.dispersion
        passes = self.history_window / self.service * np.sqrt(average / spread / (2 * np.pi))
        z = np.sqrt(2 * np.log(np.maximum(passes, math.sqrt(math.e))))
        peak = average + z * np.sqrt(spread * average) + spread * (z**2 - 1) / 6
        most = average + self.history * self.history_window
        return average, np.clip(peak, average, most)


@dataclass(frozen=True, eq=False)
class Stream:
    """One model's part of a workload."""

    time: Floats
    prompt: NDArray[np.int64]
    output: NDArray[np.int64]
    history: Floats
    service: float
    dispersion: Floats


def join(
    name: str,
    models: Sequence[ModelProfile],
    streams: Sequence[Stream],
    duration: float,
    window: float,
) -> Workload:
    """The workload of one stream a model."""
    time = np.concatenate([stream.time for stream in streams])
    order = np.argsort(time, kind="stable")
    model = np.repeat(np.arange(len(streams)), [len(stream.time) for stream in streams])
    prompt = np.concatenate([stream.prompt for stream in streams])
    output = np.concatenate([stream.output for stream in streams])
    return Workload(
        name=name,
        models=tuple(models),
        time=time[order],
        model=model[order].astype(np.int32),
        prompt=prompt[order].astype(np.int32),
        output=np.maximum(output[order], 1).astype(np.int32),
        duration=float(duration),
        history_window=float(window),
        history=np.stack([stream.history for stream in streams], axis=1),
        service=np.array([stream.service for stream in streams]),
        dispersion=np.stack([stream.dispersion for stream in streams], axis=1),
    )


def shares(n: int, alpha: float) -> Floats:
    """Of the total rate, by popularity: (i + 1)^-alpha, divided by their sum."""
    weights: Floats = np.arange(1.0, n + 1) ** -alpha
    return weights / float(weights.sum())


def alone(model: ModelProfile, prompt: float, output: float) -> float:
    """Seconds of a request of so many tokens, with nobody else on the instance."""
    return model.prefill(prompt) + output * model.decode(1)


def stream_rng(seed: int, *key: int) -> np.random.Generator:
    """A generator of one purpose, independent of those of other keys."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def check(models: Sequence[ModelProfile], rate: float, duration: float, window: float) -> None:
    """Raises ValueError for what no workload can be made of."""
    if not models:
        raise ValueError("a workload without models; there is at least one")
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two models have the name {twice!r}")
    if not 0 <= rate < math.inf:
        raise ValueError(f"a rate of {rate} requests per second; it is finite and not negative")
    if not 0 < duration < math.inf:
        raise ValueError(f"a duration of {duration} s; it is finite and positive")
    if not (0 < window <= DAY and (DAY / window).is_integer()):
        raise ValueError(f"windows of {window} s; a day has a whole number of them")
