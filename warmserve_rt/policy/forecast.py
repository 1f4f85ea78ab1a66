"""Forecast each model's concurrent requests, seconds to hours ahead."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

from .ensemble import EXPERTS, Expert, Experts, Floats
from .forecast_file import saved_state, write_state
from .open_window import OpenWindow


@dataclass(frozen=True)
class Forecast:
    """A forecast of concurrent requests; arrays [models], finite and not negative.

    ``average``: the mean over the window that ends at the horizon. ``peak``: the maximum in that
    window, at least the average. ``upper``: the quantile of the average.
    """

    average: Floats
    peak: Floats
    upper: Floats


class Forecaster:
    """A forecaster of concurrent requests that learns online.

    Methods take a model's row, its index in ``names``. :meth:`arrange` changes the models; models
    that stay keep everything that was learnt about them. Times are seconds of any clock.

    Parameters
    ----------
    models
        The names of the models, or a number of models without names.
    window
        Seconds of a window. The load is learnt in windows that begin at whole multiples of it.
    horizons
        The horizons that are learnt, in seconds; others are interpolated.
    period
        Seconds of a day of the load, by the clock.
    quantile
        The quantile of ``Forecast.upper``.
    expert
        One expert that forecasts alone, or "hedge" for the hedge over all. See `Experts` for
        formulas and sources.
    days
        The number of days that the mean over past days remembers.

    Raises
    ------
    ValueError
        If a size, a time, a name or the expert is invalid.

    Notes
    -----
    Between two calls the number of requests is taken as constant, up to the end of the third
    window. After a longer silence (the process slept, the clock leapt) the whole gap is unknown,
    and so is the window in which it began; therefore call `advance` in each window. If a window is
    joined late, the part that was seen stands for the whole if it is half of the window or more.

    If the clock is set back into the previous window, time stands still until the clock has caught
    up. If it is set back further, the open window is dropped, and repeated windows count as those
    of another day. Learnt state stays.

    Memory is about 11 KB per model at the defaults. Not thread-safe.
    """

    def __init__(
        self,
        models: int | Sequence[str],
        *,
        window: float = 300.0,
        horizons: Sequence[float] = (300.0, 3600.0, 10800.0),
        period: float = 86400.0,
        quantile: float = 0.9,
        expert: Expert | Literal["hedge"] = "hedge",
        days: int = 28,
    ) -> None:
        self.names: tuple[str, ...] | None = None
        if not isinstance(models, int):
            self.names = _checked(models)
            models = len(self.names)
        if models < (self.names is None) or days < 1:
            raise ValueError(
                f"models and days must each be at least 1, got {models} models and {days} days"
            )
        if not 0 < window < math.inf:
            raise ValueError(f"window must be positive and finite seconds, got {window}")
        leads = [_windows(horizon, window) for horizon in horizons]
        if not leads or leads != sorted(set(leads)):
            raise ValueError(f"horizons must be at least one and must rise, got {tuple(horizons)}")
        if not 0 < quantile < 1:
            raise ValueError(f"quantile must be between 0 and 1, got {quantile}")
        if expert != "hedge" and expert not in EXPERTS:
            raise ValueError(f"expert must be one of hedge, {', '.join(EXPERTS)}, got {expert!r}")
        self._options: dict[str, Any] = {
            "models": models, "window": window, "horizons": list(horizons), "period": period,
            "quantile": quantile, "expert": expert, "days": days,
        }  # fmt: skip
        self._make_experts = partial(
            Experts,
            window=window,
            leads=leads,
            slots=_windows(period, window),
            quantile=quantile,
            expert=expert,
            days=days,
        )
        self._experts = self._make_experts(models)
        self._models = models
        self._window = OpenWindow(models, float(window))

    def arrange(self, names: Sequence[str]) -> None:
        """Replace the models; row i is then the i-th name.

        Models with a known name keep what was learnt about them, and others begin without a
        history. Models that are not named again are forgotten. If the models had no names, they get
        these, which must be as many.

        Raises
        ------
        ValueError
            If a name repeats or is not a string, or if their number does not fit.
        """
        wanted = _checked(names)
        if self.names is None:
            if len(wanted) != self._models:
                raise ValueError(
                    f"the forecaster was made for {self._models} models without names and cannot "
                    f"forecast {len(wanted)}: create it with names"
                )
            self.names = wanted
        if wanted == self.names:
            return
        known = {name: row for row, name in enumerate(self.names)}
        rows = np.array([known.get(name, -1) for name in wanted], dtype=np.int64)
        experts = self._make_experts(len(wanted))
        experts.take(self._experts, rows)
        self._window.arrange(rows)
        self._experts, self._models, self.names = experts, len(wanted), wanted
        self._options["models"] = len(wanted)

    def observe(self, model: int, now: float, concurrent: float) -> None:
        """Record that a model has a new number of concurrent requests. Constant time.

        Parameters
        ----------
        model
            The row of the model.
        now
            The time in seconds.
        concurrent
            The number of its requests from ``now`` on.

        Raises
        ------
        ValueError
            If the row, the time or the number is invalid; nothing is learnt then.
        """
        if not 0 <= model < self._models:
            raise ValueError(f"model must be a row below {self._models}, got {model}")
        if not 0 <= concurrent < math.inf:
            raise ValueError(
                f"concurrent requests must be finite and not negative, got {concurrent}"
            )
        window = self._window
        if not window.begin <= now < window.end:
            self.advance(now)
        window.observe(model, now, concurrent)

    def advance(self, now: float) -> None:
        """Close every window that ended by ``now``. Raise ValueError if ``now`` is invalid."""
        self._window.advance(now, self._experts.close)

    def observe_windows(self, start: float, averages: ArrayLike, peaks: ArrayLike) -> None:
        """Learn a history of windows. The observations of the open window are dropped.

        Parameters
        ----------
        start
            The time at which the first window of the history begins.
        averages, peaks
            The averages and peaks [windows, models], oldest first; NaN is a gap.

        Raises
        ------
        ValueError
            If a shape does not fit, if a value is negative or infinite, or if ``start`` lies
            between two windows, before the open one or before the known history. Nothing is learnt
            then.
        """
        both = [np.asarray(each, dtype=np.float64) for each in (averages, peaks)]
        if any(each.ndim != 2 or each.shape != (len(both[0]), self._models) for each in both):
            raise ValueError(
                f"averages and peaks must both be [windows, {self._models} models], "
                f"got shapes {both[0].shape} and {both[1].shape}"
            )
        values = np.stack(both, axis=1)
        if (values < 0).any() or np.isinf(values).any():
            raise ValueError("averages and peaks must be finite and not negative, or NaN")
        number = self._window.number_from(start)
        open_number = self._window.number
        first = self._experts.next_number if open_number is None else open_number
        if number < first:
            known = first * self._window.seconds
            raise ValueError(f"start must be at or after {known} s, the known end, got {start} s")
        values = np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, values)
        for each in values:
            self._experts.close(number, each)
            number += 1
        self._window.drop()

    def forecast(self, now: float, horizon: float) -> Forecast:
        """Close the windows up to ``now``, and return the forecast for ``horizon`` seconds later.

        If the horizon is shorter than one window, the current level is blended in. A model without
        a closed window is forecast to stay at its current level.

        Raises
        ------
        ValueError
            If the horizon is not positive and finite, or ``now`` is not a valid time.
        """
        if not 0 < horizon < math.inf:
            raise ValueError(f"horizon must be positive and finite seconds, got {horizon}")
        window, seconds = self._window, self._window.seconds
        window.number_at(now + horizon)  # raises ValueError if it is invalid
        self.advance(now)
        assert window.number is not None
        level = np.array(window.level, dtype=np.float64)
        share = np.where(self._experts.known, min(horizon / seconds, 1.0), 0.0)
        elapsed = min(max(now - window.begin, 0.0), seconds)
        lead = max((elapsed + horizon) / seconds, 1.0)
        average, peak, upper = (
            level + share * (each - level)
            for each in self._experts.forecast(window.number - 1, lead)
        )
        return Forecast(average, peak, upper)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the whole state to a file. Atomic: after any failure the old file is unchanged."""
        header = {
            "options": self._options,
            "names": self.names,
            "number": self._window.number,
            "joined": self._window.joined,
        }
        write_state(path, header, self._window.state() | self._experts.state())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Forecaster:
        """Return the forecaster that `save` wrote to a file.

        It continues as if it had not stopped, and treats the time in between as any other silence.
        Requests that ended meanwhile must be observed as ended.

        Raises
        ------
        ValueError
            If the file is not a saved forecaster.
        OSError
            If the file cannot be read.
        """
        with saved_state(path) as (header, state):
            if state["last"].shape[-1:] != (header["options"]["models"],):
                raise ValueError("its options do not fit its arrays")
            names = header.get("names")
            models = header["options"]["models"] if names is None else names
            loaded = cls(**{**header["options"], "models": models})
            loaded._experts.restore(state)
            loaded._window.restore(header, state)
        return loaded


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names as a tuple. Raise ValueError unless they are distinct strings."""
    found = set[str]()
    for name in names:
        if not isinstance(name, str) or name in found:
            raise ValueError(f"names of models must be strings, each given once, got {name!r}")
        found.add(name)
    return tuple(names)


def _windows(seconds: float, window: float) -> int:
    """Return the number of windows in these seconds. Raise ValueError unless it is whole."""
    count = seconds / window
    if not 1 <= count < 2**31 or abs(count - round(count)) > 1e-9 * count:
        raise ValueError(f"{seconds} s is not a whole number of windows of {window} s")
    return round(count)
