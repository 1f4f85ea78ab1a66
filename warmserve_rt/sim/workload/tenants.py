"""Build workloads whose models have the traffic of ServeGen's clients, over days."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from warmserve_rt.policy.profile import ModelProfile

from . import traces
from .arrivals import DAY, MAX_CV, PAST_DAYS, Floats, divide_windows, renewal
from .requests import (
    Stream,
    Workload,
    check_arguments,
    join_streams,
    seconds_alone,
    shares,
    stream_rng,
)

MIN_ACTIVE = 0.05  # a tenant sends requests in at least this share of all windows
_W = traces.SERVEGEN_WINDOW
_PER_DAY = round(DAY / _W)


def servegen(
    mix: str,
    models: Sequence[ModelProfile],
    rate: float,
    duration: float,
    seed: int,
    day: int | None = None,
    hour: float | None = None,
    alpha: float = 0.5,
    prompt_cap: int = 8192,
    window: float = 300.0,
) -> Workload:
    """Build a workload in which each model has the traffic of one client of ServeGen.

    Clients are drawn without replacement (again when all are taken) among those of the class that
    are active in 5 % of the windows: 80, 79 and 38. Model i's mean over the 14 days has the share
    (i + 1)^-alpha, so that bursts remain. A further factor, the same for all models, makes the mean
    total of the run ``rate``. If n requests are expected in a window, their number is Poisson with
    mean n, and their times are those of a renewal process with the client's cv (at most 30) and
    family for that window. Tokens are independent draws from the client's quantiles.

    The history consists of the seven days before the run. If its windows divide those of the
    record, the requests are divide_windows as the renewal process would divide them.

    Parameters
    ----------
    mix
        The class of clients: "periodic", "middle" or "aperiodic".
    models, rate, duration, seed, alpha, prompt_cap
        See ``azure``.
    day, hour
        The run starts on this day (8 to 14) at this hour, rounded down to 10 minutes. If one is
        missing, the start is drawn among times without a gap in the recording at which the total,
        before the last factor, is within a factor of two of ``rate``.
    window
        Seconds of a history window; must divide 600 s or be a multiple of it.

    Raises
    ------
    ValueError
        As ``azure`` does, if the mix is unknown, if the run goes past the end of day 14, if the
        window does not fit, or if every tenant is silent throughout the run.
    """
    check_arguments(models, rate, duration, window)
    traffic = traces.servegen()
    clients = _clients(traffic, mix, len(models), stream_rng(seed, 0))
    rates = traffic.rates[clients].astype(np.float64)
    rates *= (shares(len(models), alpha) * rate / np.nanmean(rates, axis=1))[:, None]
    start = _start(rates, rate, duration, day, hour, stream_rng(seed, 1))
    span = math.ceil(duration / _W)
    total = float((np.nan_to_num(rates[:, start : start + span]) @ _weights(duration)).sum())
    if rate > 0 and total == 0:
        at, after = divmod(start, _PER_DAY)
        raise ValueError(f"from day {at + 1}, hour {after * _W / 3600:g}, every tenant is silent")
    expected = np.nan_to_num(rates * _W) * (rate * duration / total if rate else 0.0)
    gaps = np.isnan(rates)
    cvs = np.nan_to_num(traffic.cvs[clients].astype(np.float64), nan=1.0)
    run, past = slice(start, start + span), slice(start - PAST_DAYS * _PER_DAY, start)
    streams = []
    for i, client in enumerate(clients):
        rng = stream_rng(seed, 2, i)
        time = renewal(
            rng.poisson(expected[i, run]), cvs[i, run], traffic.weibull[client, run], _W, rng
        )
        time = time[time < duration]
        prompts, outputs = traffic.tokens[client]
        prompt = np.minimum(_draw(prompts, rng.random(len(time))), prompt_cap)
        output = _draw(outputs, rng.random(len(time)))
        counts = rng.poisson(expected[i, past])
        grid = (np.arange(1000) + 0.5) / 1000
        mean_prompt = np.minimum(_draw(prompts, grid), prompt_cap).mean()
        service = seconds_alone(models[i], mean_prompt, _draw(outputs, grid).mean())
        spread = _dispersion(cvs[i, past], expected[i, past] * (service / _W))
        streams.append(
            Stream(
                time=time,
                prompt=prompt,
                output=output,
                history=_history(counts, cvs[i, past], gaps[i, past], window, rng),
                service=service,
                dispersion=_spread_over(spread, window),
            )
        )
    return join_streams(f"servegen-{mix}", models, streams, duration, window)


def _clients(
    traffic: traces.ServeGen, mix: str, n: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    rows = traffic.of_class(mix)
    rates = traffic.rates[rows]
    active = (rates > 0).sum(axis=1) / (rates >= 0).sum(axis=1)
    drawn = rng.permutation(rows[active >= MIN_ACTIVE])
    return np.resize(drawn, n)


def _weights(duration: float) -> Floats:
    """Return the seconds of each window of the record that a run of this duration covers."""
    span = math.ceil(duration / _W)
    weights = np.full(span, _W)
    weights[-1] = duration - (span - 1) * _W
    return weights


def _start(
    rates: Floats,
    rate: float,
    duration: float,
    day: int | None,
    hour: float | None,
    rng: np.random.Generator,
) -> int:
    """Return the window of the record in which the run starts."""
    weights = _weights(duration)
    first, last = PAST_DAYS * _PER_DAY, rates.shape[1] - len(weights)
    if day is not None and not PAST_DAYS < day <= traces.SERVEGEN_DAYS:
        raise ValueError(f"day must be from {PAST_DAYS + 1} to {traces.SERVEGEN_DAYS}, got {day}")
    if hour is not None and not 0 <= hour < 24:
        raise ValueError(f"hour must be at least 0 and below 24, got {hour}")
    starts = np.arange(first, last + 1)
    if day is not None:
        starts = starts[starts // _PER_DAY == day - 1]
    if hour is not None:
        starts = starts[starts % _PER_DAY == math.floor(hour * 3600 / _W)]
    if not len(starts):
        raise ValueError(f"a run of {duration} s goes past the end of day {traces.SERVEGEN_DAYS}")
    if len(starts) == 1 or rate == 0:
        return int(starts[0])
    views = np.lib.stride_tricks.sliding_window_view(rates.sum(axis=0), len(weights))
    loads = views[starts] @ weights / (rate * duration)  # NaN if any tenant has a gap
    drawn = rng.permutation(len(starts))
    fair = drawn[(loads[drawn] > 0.5) & (loads[drawn] < 2)]
    if len(fair):
        return int(starts[fair[0]])
    # No start is near the rate. Take the fullest: a quiet hour scaled up is no longer that client.
    return int(starts[np.argmax(np.nan_to_num(loads))])


def _draw(table: Floats, quantile: Floats) -> NDArray[np.int64]:
    """Return the tokens at these quantiles, constant beyond the outermost of the record."""
    values = np.interp(quantile, traces.QUANTILES, table)
    return np.maximum(np.rint(values), 1).astype(np.int64)


def _history(
    counts: NDArray[np.int64],
    cvs: Floats,
    gaps: NDArray[np.bool_],
    window: float,
    rng: np.random.Generator,
) -> Floats:
    """Return requests per second in windows of another length than the record's."""
    if window <= _W:
        parts = _parts(_W / window)
        rates: Floats = divide_windows(counts, cvs, parts, rng) / window
        rates[np.repeat(gaps, parts)] = np.nan
        return rates
    summed: Floats = counts.reshape(-1, _parts(window / _W)).sum(axis=1) / window
    summed[gaps.reshape(len(summed), -1).any(axis=1)] = np.nan
    return summed


def _dispersion(cvs: Floats, mean: Floats) -> Floats:
    """Return the dispersion of the number of requests in intervals with ``mean`` requests.

    For a Gamma process it goes from 1 for few requests to cv^2 for many. The form between is a fit
    to draws, within 30 % for a cv up to 4.5.
    """
    squared = np.clip(cvs, 1.0, MAX_CV) ** 2
    between: Floats = 1 + (squared - 1) * np.cbrt(mean / (mean + squared / 2))
    return between


def _spread_over(dispersion: Floats, window: float) -> Floats:
    if window <= _W:
        return np.repeat(dispersion, _parts(_W / window))
    mean: Floats = dispersion.reshape(-1, _parts(window / _W)).mean(axis=1)
    return mean


def _parts(ratio: float) -> int:
    if not ratio.is_integer():
        raise ValueError("windows must divide ServeGen's 600 s or be multiples of them")
    return round(ratio)
