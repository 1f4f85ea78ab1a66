"""Turn observations into the values of windows: the average and the peak of concurrent requests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .ensemble import Floats

PATIENCE = 3  # windows without a call after which the load of the gap is unknown
STATE = ("level", "since", "area", "peak")


class OpenWindow:
    """The window that contains the present, in which requests are still observed.

    Windows begin at whole multiples of ``seconds`` of the clock and are numbered by them. No window
    is open before the first observation and after :meth:`drop`.

    Attributes
    ----------
    number
        The number of the open window, or None.
    begin, end
        The times at which the open window begins and ends; infinite while none is open.
    joined
        The time at which the open window was first seen.
    level
        The concurrent requests of each model since its last observation.
    """

    def __init__(self, models: int, seconds: float) -> None:
        self.seconds = seconds
        self.number: int | None = None
        self.begin = self.end = math.inf
        self.joined = 0.0
        # Lists, because reading and writing an element of an array costs three times as much.
        self.level = [0.0] * models
        self.since = [0.0] * models  # the time from which the level counts
        self.area = [0.0] * models  # request seconds in the open window, up to `since`
        self.peak = [0.0] * models

    def observe(self, model: int, now: float, concurrent: float) -> None:
        """Record a model's concurrent requests from ``now`` on, a time in the open window."""
        since = self.since[model]
        if now > since:
            self.area[model] += self.level[model] * (now - since)
            self.since[model] = now
        self.level[model] = concurrent
        if concurrent > self.peak[model]:
            self.peak[model] = concurrent

    def advance(self, now: float, learn: Callable[[int, Floats], None]) -> None:
        """Close every window that ended by ``now``, and open the one that contains it.

        The levels are taken as constant until the end of a window. After more than ``PATIENCE``
        windows, or if the clock was set back by more than one, the open window is dropped.

        Parameters
        ----------
        now
            The time in seconds.
        learn
            Called with the number and the values [2, models] of each closed window of which at
            least half was seen.

        Raises
        ------
        ValueError
            If ``now`` is not a valid time.
        """
        number = self.number_at(now)
        if self.number is None or not -1 <= number - self.number <= PATIENCE:
            self._open(number, now)
            return
        while self.number < number:
            if (values := self._values()) is not None:
                learn(self.number, values)
            self._open(self.number + 1, self.end)

    def drop(self) -> None:
        """Close the open window without its values. No window is open afterwards."""
        self.number = None
        self.begin = self.end = math.inf

    def number_at(self, time: float) -> int:
        """Return the number of the window that contains this time. Raise ValueError if invalid."""
        number = time / self.seconds
        if not abs(number) < 2**53:
            raise ValueError(f"{time} s is not a time: it must be within 2**53 windows of 0")
        return math.floor(number)

    def number_from(self, start: float) -> int:
        """Return the number of the window that begins at this time. Raise ValueError if no window
        begins then."""
        self.number_at(start)  # raises ValueError if it is invalid
        number = round(start / self.seconds)
        if not math.isclose(number * self.seconds, start, abs_tol=1e-6 * self.seconds):
            raise ValueError(f"start must begin a window of {self.seconds} s, got {start} s")
        return number

    def arrange(self, rows: NDArray[np.int64]) -> None:
        """Replace the models. ``rows``: for each model its row before, or -1 if it is new."""
        known, new = bool(self.level), rows < 0
        for name in STATE:
            values = np.array(getattr(self, name))[rows] if known else np.zeros(len(rows))
            values[new] = self.joined if name == "since" else 0.0
            setattr(self, name, values.tolist())

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that :meth:`restore` needs, besides ``number`` and ``joined``."""
        return {name: np.array(getattr(self, name), dtype=np.float64) for name in STATE}

    def restore(self, header: Mapping[str, Any], state: Mapping[str, NDArray[Any]]) -> None:
        """Continue from a saved state.

        Parameters
        ----------
        header
            The saved ``number`` and ``joined``.
        state
            The arrays of :meth:`state`.

        Raises
        ------
        ValueError
            If an array is invalid.
        """
        models = len(self.level)
        if header["number"] is not None:
            self._open(int(header["number"]), float(header["joined"]))
        for name in STATE:
            values = np.asarray(state[name], dtype=np.float64)
            if values.shape != (models,) or not np.isfinite(values).all():
                raise ValueError(f"{name} must have a finite number for each model")
            setattr(self, name, values.tolist())

    def _open(self, number: int, joined: float) -> None:
        """Open a window that is seen from ``joined`` on, and drop earlier observations."""
        self.number = number
        self.begin, self.end = number * self.seconds, (number + 1) * self.seconds
        self.joined = joined
        self.since = [joined] * len(self.level)
        self.area = [0.0] * len(self.level)
        self.peak = self.level.copy()

    def _values(self) -> Floats | None:
        """Return the averages and peaks at the end of the open window, or None if less than half of
        it was seen."""
        end, seen = self.end, self.end - self.joined
        if seen >= self.seconds / 2:
            level, since, area, peak = (
                np.array(each, dtype=np.float64)
                for each in (self.level, self.since, self.area, self.peak)
            )
            average = np.maximum(area + level * (end - since), 0.0) / seen
            return np.stack([average, peak])
        return None
