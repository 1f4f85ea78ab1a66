"""The workload of a simulation: requests in order of time, and the history before them."""

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
    """Requests in order of time, and the history before them.

    Attributes
    ----------
    name
        The name in reports.
    models
        The profiles of the models.
    time
        Seconds in [0, ``duration``), ascending; float64[n].
    model
        The index of each request's model in ``models``; int32[n].
    prompt, output
        Tokens of each request, of output at least 1; int32[n].
    duration
        Seconds in which requests arrive.
    history_window
        Seconds of each window of the history.
    history
        Requests per second in the windows that end at time 0, oldest first; float64[windows,
        models]. NaN marks a gap in the recording. There may be no windows.
    service
        Mean seconds of a request that is served alone, over the source of the requests and not over
        these; float64[models].
    dispersion
        Variance over mean of the number of requests in intervals about as long as ``service``;
        float64[windows, models].
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
        """Return the average and the peak of concurrent requests, each [windows, models]. NaN
        marks a gap.

        The average follows from Little's law: rate times mean service time, a = r s. With unlimited
        servers and Poisson arrivals the concurrency is Poisson with mean a; a dispersion of D makes
        its variance D a. It crosses a level z standard deviations above the mean upwards as often
        as a request arrives while it is at that level: (a / s) phi(z) / sqrt(D a) times per second
        (Rice). The peak of a window of w seconds is the level that it crosses once,
        z = sqrt(2 log(w sqrt(a / D) / (s sqrt(2 pi)))). This is a + z sqrt(D a) plus, for the skew
        of the distribution, D (z^2 - 1) / 6 (Cornish and Fisher). The peak is at least a, and at
        most a plus all requests of the window.
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


def join_streams(
    name: str,
    models: Sequence[ModelProfile],
    streams: Sequence[Stream],
    duration: float,
    window: float,
) -> Workload:
    """Join one stream for each model into a workload.

    Parameters
    ----------
    name
        The name in reports.
    models
        The profiles of the models.
    streams
        The stream of each model.
    duration
        Seconds in which requests arrive.
    window
        Seconds of a history window.
    """
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
    """Return the models' shares of the total rate: (i + 1)^-alpha, divided by their sum.

    Parameters
    ----------
    n
        The number of models.
    alpha
        The exponent of the power law.
    """
    weights: Floats = np.arange(1.0, n + 1) ** -alpha
    return weights / float(weights.sum())


def seconds_alone(model: ModelProfile, prompt: float, output: float) -> float:
    """Return the seconds of a request that is alone on its instance.

    Parameters
    ----------
    model
        The profile of its model.
    prompt, output
        Its tokens.
    """
    return model.prefill(prompt) + output * model.decode(1)


def stream_rng(seed: int, *key: int) -> np.random.Generator:
    """Return the random generator of one purpose, independent of those of other keys."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def check_arguments(
    models: Sequence[ModelProfile], rate: float, duration: float, window: float
) -> None:
    """Raise ValueError if no workload can be made of these arguments.

    Parameters
    ----------
    models
        The profiles of the models.
    rate
        Requests per second.
    duration
        Seconds in which requests arrive.
    window
        Seconds of a history window.
    """
    if not models:
        raise ValueError("a workload must have at least one model, got none")
    names = [model.name for model in models]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two models have the name {twice!r}: names must differ")
    if not 0 <= rate < math.inf:
        raise ValueError(f"rate must be finite and not negative requests per second, got {rate}")
    if not 0 < duration < math.inf:
        raise ValueError(f"duration must be finite and positive seconds, got {duration}")
    if not (0 < window <= DAY and (DAY / window).is_integer()):
        raise ValueError(f"a day must be a whole number of windows, got windows of {window} s")
