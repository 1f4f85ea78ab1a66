"""How many requests each model will have at once, seconds to hours from now."""

from __future__ import annotations

import json
import math
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .ensemble import EXPERTS, Expert, Experts, Floats

_FORMAT = "warmserve_rt forecaster 1"
_PATIENCE = 3  # windows without a call after which what passed is unknown
_OPEN = ("level", "since", "area", "peak")


@dataclass(frozen=True)
class Forecast:
    """Of each model, concurrent requests; arrays [models], finite and not negative.

    ``average``: the mean over the window that ends at the horizon. ``peak``: the most in it, at
    least the average. ``upper``: the quantile of the average.
    """

    average: Floats
    peak: Floats
    upper: Floats


class Forecaster:
    """Forecasts the concurrent requests of ``models``: names, or a number of models without names.

    Methods take a model's row, its place in ``names``. :meth:`arrange` changes the models: those
    that stay keep everything that was learnt about them.

    Load is learnt in windows of ``window`` seconds that begin at whole multiples of it. Times are
    seconds of any clock whose ``period`` is a day of the load's; ``horizons``, in seconds, are
    those that are learnt: others are interpolated. ``quantile`` is that of ``Forecast.upper``.
    ``expert`` forecasts alone, or the hedge over all (see `Experts` for formulas and sources).
    ``days``: how many the mean over past days remembers.

    Between two calls the number of requests is taken not to have changed, up to the end of a third
    window; after a longer silence (the process slept, the clock leapt) all of it is unknown, and so
    is the window that it began in: call `advance` in each window. Of a window that is joined late,
    the part seen stands for it if that is half of it or more. When the clock is set back into the
    window before, time stands still until it has caught up; when further, the open window is
    dropped, and windows that come again count as another day's. What was learnt stays.

    Memory is about 11 KB a model at the defaults. Not for several threads at once.

    Raises ValueError for sizes, times or names that make no sense.
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
            raise ValueError(f"{models} models, {days} days: at least one of each is needed")
        if not 0 < window < math.inf:
            raise ValueError(f"a window of {window} s: it is finite and positive")
        leads = [_windows(horizon, window) for horizon in horizons]
        if not leads or leads != sorted(set(leads)):
            raise ValueError(f"horizons {tuple(horizons)}: at least one, and each after the other")
        if not 0 < quantile < 1:
            raise ValueError(f"a quantile of {quantile}: it lies between 0 and 1")
        if expert != "hedge" and expert not in EXPERTS:
            raise ValueError(f"no expert {expert!r}: hedge, {', '.join(EXPERTS)}")
        self._options: dict[str, Any] = {
            "models": models, "window": window, "horizons": list(horizons), "period": period,
            "quantile": quantile, "expert": expert, "days": days,
        }  # fmt: skip
        self._window = float(window)
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
        # Lists, for an element of an array costs three times as much to read and write.
        self._level = [0.0] * models
        self._since = [0.0] * models  # the level counts from then on
        self._area = [0.0] * models  # request seconds in the open window, up to `since`
        self._peak = [0.0] * models
        self._number: int | None = None  # of the open window
        self._begin = self._end = math.inf  # of the open window: no time lies in it yet
        self._joined = 0.0  # when it was first seen

    def arrange(self, names: Sequence[str]) -> None:
        """Forecasts these models from now on, row i being the i-th. Models with a name that was
        known keep what was learnt, others begin without a past, and the rest is forgotten. Models
        without names get these names, and must be as many.

        Raises ValueError for names that repeat or are too many or too few."""
        wanted = _checked(names)
        if self.names is None:
            if len(wanted) != self._models:
                raise ValueError(
                    f"the forecaster was made for {self._models} models without names and cannot "
                    f"forecast {len(wanted)}: make it of their names"
                )
            self.names = wanted
        if wanted == self.names:
            return
        known = {name: row for row, name in enumerate(self.names)}
        rows = np.array([known.get(name, -1) for name in wanted], dtype=np.int64)
        experts = self._make_experts(len(wanted))
        experts.take(self._experts, rows)
        new = rows < 0
        for name in _OPEN:
            values = np.array(getattr(self, f"_{name}"))[rows] if known else np.zeros(len(rows))
            values[new] = self._joined if name == "since" else 0.0
            setattr(self, f"_{name}", values.tolist())
        self._experts, self._models, self.names = experts, len(wanted), wanted
        self._options["models"] = len(wanted)

    def observe(self, model: int, now: float, concurrent: float) -> None:
        """``model`` has ``concurrent`` requests from ``now`` on. Constant time.

        Raises ValueError, having learnt nothing, for a model or a number that cannot be."""
        if not 0 <= model < self._models:
            raise ValueError(f"no model {model}: there are {self._models}")
        if not 0 <= concurrent < math.inf:
            raise ValueError(f"{concurrent} concurrent requests: finite, and not negative")
        if not self._begin <= now < self._end:
            self.advance(now)
        since = self._since[model]
        if now > since:
            self._area[model] += self._level[model] * (now - since)
            self._since[model] = now
        self._level[model] = concurrent
        if concurrent > self._peak[model]:
            self._peak[model] = concurrent

    def advance(self, now: float) -> None:
        """Closes every window that ended by ``now``. Raises ValueError if that is not a time."""
        number = self._at(now)
        if self._number is not None and -1 <= number - self._number <= _PATIENCE:
            while self._number < number:
                self._close()
        else:
            self._open(number, now)

    def observe_windows(self, start: float, averages: ArrayLike, peaks: ArrayLike) -> None:
        """History: averages and peaks [windows, models], oldest first; NaN is a gap. The first of
        them begins at ``start``. What was seen of the open window is dropped.

        Raises ValueError, having learnt nothing, for other shapes, for what is negative or
        infinite, and for a start between two windows, before the open one or before history."""
        both = [np.asarray(each, dtype=np.float64) for each in (averages, peaks)]
        if any(each.ndim != 2 or each.shape != (len(both[0]), self._models) for each in both):
            raise ValueError(
                f"averages {both[0].shape} and peaks {both[1].shape}: both are "
                f"[windows, {self._models} models]"
            )
        values = np.stack(both, axis=1)
        if (values < 0).any() or np.isinf(values).any():
            raise ValueError("averages and peaks are finite and not negative, or NaN")
        self._at(start)
        number = round(start / self._window)
        if not math.isclose(number * self._window, start, abs_tol=1e-6 * self._window):
            raise ValueError(f"{start} s is not where a window of {self._window} s begins")
        first = self._experts.next_number if self._number is None else self._number
        if number < first:
            raise ValueError(
                f"{start} s is before {first * self._window} s, up to which all is known"
            )
        values = np.where(np.isnan(values).any(axis=1, keepdims=True), np.nan, values)
        for each in values:
            self._experts.close(number, each)
            number += 1
        self._number = None
        self._begin = self._end = math.inf

    def forecast(self, now: float, horizon: float) -> Forecast:
        """For ``horizon`` seconds after ``now``, up to which windows are closed.

        Below one window the level of now has its share; a model that has had no window yet is
        forecast to stay at that level. Raises ValueError for a horizon that is not positive."""
        if not 0 < horizon < math.inf:
            raise ValueError(f"a horizon of {horizon} s: it is finite and positive")
        self._at(now + horizon)
        self.advance(now)
        assert self._number is not None
        level = np.array(self._level, dtype=np.float64)
        share = np.where(self._experts.known, min(horizon / self._window, 1.0), 0.0)
        elapsed = min(max(now - self._begin, 0.0), self._window)
        lead = max((elapsed + horizon) / self._window, 1.0)
        average, peak, upper = (
            level + share * (each - level)
            for each in self._experts.forecast(self._number - 1, lead)
        )
        return Forecast(average, peak, upper)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything to a file, which is whole or as it was before, whatever happens."""
        path = Path(path)
        header = {
            "format": _FORMAT,
            "options": self._options,
            "names": self.names,
            "number": self._number,
            "joined": self._joined,
        }
        state: dict[str, NDArray[Any]] = {
            name: np.array(getattr(self, f"_{name}"), dtype=np.float64) for name in _OPEN
        }
        state |= self._experts.state()
        aside = path.with_name(f"{path.name}.{os.getpid()}.part")
        try:
            with open(aside, "wb") as file:
                np.savez(file, header=np.array(json.dumps(header)), **state)  # type: ignore[arg-type]
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Forecaster:
        """What `save` wrote; it goes on as if it had never stopped, and takes the time in between
        as any silence. Requests that ended meanwhile must be observed as ended.

        Raises ValueError if the file is not one, OSError if it cannot be read."""
        refused = (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError)
        try:
            with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
                state = {name: file[name] for name in file.files}
            header = json.loads(str(state["header"]))
            if header["format"] != _FORMAT:
                raise ValueError(f"its format is {header['format']!r}")
            if state["last"].shape[-1:] != (header["options"]["models"],):
                raise ValueError("its options are not of its arrays")
            names = header.get("names")
            models = header["options"]["models"] if names is None else names
            loaded = cls(**{**header["options"], "models": models})
            loaded._restore(header, state)
        except (*refused, AttributeError, OverflowError, NotImplementedError) as error:
            raise ValueError(f"{path} is not a saved forecaster: {error}") from error
        return loaded

    def _restore(self, header: dict[str, Any], state: dict[str, NDArray[Any]]) -> None:
        self._experts.restore(state)
        if header["number"] is not None:
            self._open(int(header["number"]), float(header["joined"]))
        for name in _OPEN:
            values = np.asarray(state[name], dtype=np.float64)
            if values.shape != (self._models,) or not np.isfinite(values).all():
                raise ValueError(f"{name} is not a number for each model")
            setattr(self, f"_{name}", values.tolist())

    def _at(self, time: float) -> int:
        """The number of the window in which it lies."""
        number = time / self._window
        if not abs(number) < 2**53:
            raise ValueError(f"{time} s is not a time")
        return math.floor(number)

    def _open(self, number: int, joined: float) -> None:
        """Begins a window, seen from ``joined`` on. What the one before it had seen is dropped."""
        self._number = number
        self._begin, self._end = number * self._window, (number + 1) * self._window
        self._joined = joined
        self._since = [joined] * self._models
        self._area = [0.0] * self._models
        self._peak = self._level.copy()

    def _close(self) -> None:
        """Learns the open window, to whose end the levels have stayed, and opens the next."""
        assert self._number is not None
        end, seen = self._end, self._end - self._joined
        if seen >= self._window / 2:
            level, since, area, peak = (
                np.array(each, dtype=np.float64)
                for each in (self._level, self._since, self._area, self._peak)
            )
            average = np.maximum(area + level * (end - since), 0.0) / seen
            self._experts.close(self._number, np.stack([average, peak]))
        self._open(self._number + 1, end)


def _checked(names: Sequence[str]) -> tuple[str, ...]:
    """Raises ValueError unless all are names, and each is there once."""
    found = set[str]()
    for name in names:
        if not isinstance(name, str) or name in found:
            raise ValueError(f"names of models must be strings, each given once, got {name!r}")
        found.add(name)
    return tuple(names)


def _windows(seconds: float, window: float) -> int:
    """How many windows it is."""
    count = seconds / window
    if not 1 <= count < 2**31 or abs(count - round(count)) > 1e-9 * count:
        raise ValueError(f"{seconds} s is not a whole number of windows of {window} s")
    return round(count)
