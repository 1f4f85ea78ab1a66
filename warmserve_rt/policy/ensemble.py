"""Forecast from closed windows, for all models at once: several experts, a hedge over them and an
upper quantile. The module ``open_window`` decides which window is open and which are gaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Floats: TypeAlias = "NDArray[np.float64]"

Expert: TypeAlias = Literal["last", "paper", "seasonal", "daily", "recent"]
EXPERTS: tuple[Expert, ...] = ("last", "paper", "seasonal", "daily", "recent")
AVERAGE, PEAK = 0, 1  # the two channels of a window's values

ERRORS = 10  # windows whose errors the paper's predictor averages
RECENT_S = 1200.0  # half-life of the level that `recent` forecasts
MEMORY_S = 43200.0  # half-life of the experts' losses and of the spread
STEP = 0.05  # step of the upper quantile, in spreads per window
NEVER = -(2**62)  # stands for no window


class Experts:
    """Learn from closed windows of ``models`` models, and forecast the window ``leads`` windows on.

    Windows are numbered by time: window n is the n-th since the epoch of the caller's clock, and n
    modulo ``slots`` is its slot in the day. A window's values are [2, models]: average and peak;
    NaN is unknown. Each expert forecasts both by the same formula, never below zero, from the last
    known value, the mean m(slot) over past days and the errors e = value - m, each taken before m
    learnt the value:

    - last: the last value.
    - paper: m(target) + the mean of the last 10 errors, weighted 1, 1/2, 1/4, ..., newest heaviest
      (WarmServe, arXiv 2512.09472).
    - seasonal: the last value + (m(target) - m(slot of the last value)) / 2.
    - daily: m(target).
    - recent: the exponentially weighted mean of the values, with a half-life of 20 minutes.

    If a slot has no past, experts that use m forecast the last value. m is the plain mean of the
    first ``days`` days, and an exponentially weighted mean after them.

    The hedge weights expert i by L_i^-8, where L_i is the model's discounted sum of absolute errors
    at that lead (half-life 12 h): the inverse-error weights of Bates and Granger (1969), discounted
    as by Stock and Watson (2004), sharpened. The weights have no scale: a model with 1 request and
    a model with 1000 learn alike. The upper forecast adds q spreads (the discounted mean absolute
    error) to the average; q follows the quantile's subgradient,
    q += step * (missed - (1 - quantile)), as in adaptive conformal inference (Gibbs and Candes,
    2021). An idle window that was forecast as idle does not change q. Otherwise q would sink while
    a model is idle, and the upper forecast would miss its first burst.

    The state is in arrays whose last axis is the models. Closing a window takes about 50 numpy
    operations, whatever the number of models or past windows.
    """

    STATE = (
        "mean", "days_seen", "errors", "error_numbers", "correction", "last", "anchor", "recent",
        "loss", "offset", "spread", "spread_weight", "pending", "pending_average",
        "pending_upper", "pending_numbers", "known", "number",
    )  # fmt: skip

    SHARED = ("error_numbers", "pending_numbers", "number")  # arrays without an axis of models

    def __init__(
        self,
        models: int,
        *,
        window: float,
        leads: Sequence[int],
        slots: int,
        quantile: float,
        expert: Expert | Literal["hedge"],
        days: int,
    ) -> None:
        self._slots, self._quantile, self._days = slots, quantile, days
        self._only = None if expert == "hedge" else EXPERTS.index(expert)
        self._leads = np.array(leads, dtype=np.int64)
        self._rows = np.cumsum(self._leads) - self._leads  # first row of each lead's ring
        self._fade = 0.5 ** (window / MEMORY_S)
        self._gain = 1.0 - 0.5 ** (window / RECENT_S)

        of_lead, rings = (len(leads), models), int(self._leads.sum())
        self.mean = np.zeros((slots, 2, models))
        self.days_seen = np.zeros((slots, models), dtype=np.int32)
        self.errors = np.full((ERRORS, 2, models), np.nan)
        self.error_numbers = np.full(ERRORS, NEVER)
        self.correction = np.zeros((2, models))  # the paper's averaged error
        self.last = np.zeros((2, models))
        self.anchor = np.full((2, models), np.nan)  # m of the slot of `last`
        self.recent = np.zeros((2, models))
        self.loss = np.zeros((len(leads), len(EXPERTS), 2, models))
        self.offset = np.ones(of_lead)  # q
        self.spread = np.zeros(of_lead)
        self.spread_weight = np.zeros(of_lead)
        # Forecasts of windows that are not yet known, in one ring for each lead.
        self.pending = np.zeros((rings, len(EXPERTS), 2, models))
        self.pending_average = np.zeros((rings, models))
        self.pending_upper = np.zeros((rings, models))
        self.pending_numbers = np.full(rings, NEVER)
        self.known = np.zeros(models, dtype=bool)  # whether a window of the model was closed
        self.number = np.array(NEVER)  # the latest closed window
        self._weights = self._weigh()

    def state(self) -> dict[str, NDArray[Any]]:
        """Return the state that `restore` takes."""
        return {name: getattr(self, name) for name in self.STATE}

    def restore(self, state: dict[str, NDArray[Any]]) -> None:
        """Continue from a saved state. Raise ValueError if shapes, types or values do not fit."""
        for name in self.STATE:
            mine, other = getattr(self, name), state[name]
            if other.shape != mine.shape or other.dtype != mine.dtype:
                raise ValueError(
                    f"{name} must be {mine.dtype}{mine.shape}, got {other.dtype}{other.shape}"
                )
            may_miss = name in ("errors", "anchor", "pending_average")
            if np.isinf(other).any() or (not may_miss and np.isnan(other).any()):
                raise ValueError(f"{name} must be finite")
            setattr(self, name, other.copy())
        self._weights = self._weigh()

    def take(self, other: Experts, rows: NDArray[np.int64]) -> None:
        """Continue from the state of another instance with other models.

        Model i continues from its model ``rows[i]``, or begins without a history if that is -1.
        """
        kept = np.flatnonzero(rows >= 0)
        for name in self.STATE:
            mine, theirs = getattr(self, name), getattr(other, name)
            if name in self.SHARED:
                setattr(self, name, theirs.copy())
            else:
                mine[..., kept] = theirs[..., rows[kept]]
        self.pending_average[:, rows < 0] = np.nan
        self._weights = self._weigh()

    def close(self, number: int, values: Floats) -> None:
        """Learn the values [2, models] of window ``number``.

        The two values of a model are both known or both NaN. Windows that are left out are unknown.
        A number that is closed again counts as another day of its slot.
        """
        known = ~np.isnan(values[AVERAGE])
        values = np.where(known, values, 0.0)
        self._score(number, values, known)
        self._learn(number, values, known)
        self.number = np.array(number)
        self._weights = self._weigh()

        rows, ahead = self._rows + number % self._leads, number + self._leads
        predictions = self._predict(ahead)
        average = (self._weights[:, :, AVERAGE] * predictions[:, :, AVERAGE]).sum(1)
        self.pending[rows] = predictions
        self.pending_average[rows] = average
        self.pending_upper[rows] = average + self._margin()  # if negative, any load exceeds it
        self.pending_numbers[rows] = ahead

    @property
    def next_number(self) -> int:
        """Return the number after that of the latest closed window."""
        return int(self.number) + 1

    def forecast(self, number: int, lead: float) -> tuple[Floats, Floats, Floats]:
        """Return average, peak and upper average [models] of a future window.

        A model without a closed window is forecast as 0.

        Parameters
        ----------
        number
            The latest window that has ended.
        lead
            The forecast window ends this many windows after window ``number``; at least 1. If
            it is not whole, the forecasts of the two windows that it overlaps are mixed by overlap.
            Weights and margins between learnt leads are interpolated; beyond the last lead, those
            of the last are used.
        """
        low = int(lead)
        share = lead - low
        near = self._predict(number + np.array([low, low + 1]))
        predictions = near[0] + share * (near[1] - near[0])
        lead += max(number + 1 - self.next_number, 0)  # plus windows that were not learnt
        above = int(np.searchsorted(self._leads, lead))
        first, second = max(above - 1, 0), min(above, len(self._leads) - 1)
        begin, end = self._leads[first], self._leads[second]
        part = 0.0 if begin == end else (lead - begin) / (end - begin)
        weights = self._weights[first] + part * (self._weights[second] - self._weights[first])
        margins = self._margin()
        margin = margins[first] + part * (margins[second] - margins[first])
        average, peak = (weights * predictions).sum(0)
        return average, np.maximum(peak, average), np.maximum(average + margin, 0.0)

    def _score(self, number: int, values: Floats, known: NDArray[np.bool_]) -> None:
        """Compare the forecasts of this window with its values, and update losses and margins."""
        rows = self._rows + number % self._leads
        # Models that were added later have no forecast of this window.
        forecast = ~np.isnan(self.pending_average[rows])
        scored = (self.pending_numbers[rows] == number)[:, None] & known & forecast
        miss = np.abs(self.pending[rows] - values)
        self.loss = np.where(scored[:, None, None], self._fade * self.loss + miss, self.loss)

        actual, upper = values[AVERAGE], self.pending_upper[rows]
        taught = scored & ((actual > 0) | (upper > 0))
        self.offset += np.where(taught, STEP * ((actual > upper) - (1 - self._quantile)), 0.0)
        fade = np.where(scored, self._fade, 1.0)
        error = np.where(scored, np.abs(actual - self.pending_average[rows]), 0.0)
        self.spread = fade * self.spread + (1 - fade) * error
        self.spread_weight = fade * self.spread_weight + (1 - fade)

    def _learn(self, number: int, values: Floats, known: NDArray[np.bool_]) -> None:
        slot = number % self._slots
        mean, seen = self.mean[slot], self.days_seen[slot]
        at = number % ERRORS
        self.errors[at] = np.where(known & (seen > 0), values - mean, np.nan)
        self.error_numbers[at] = number
        age = number - self.error_numbers
        valid = ~np.isnan(self.errors) & ((age >= 0) & (age < ERRORS))[:, None, None]
        weights = 0.5 ** np.clip(age, 0, ERRORS)[:, None, None] * valid
        total = (weights * np.where(valid, self.errors, 0.0)).sum(0)
        self.correction = total / np.maximum(weights.sum(0), 1e-9)

        self.anchor = np.where(known, np.where(seen > 0, mean, np.nan), self.anchor)
        seen += known
        mean += known * (values - mean) / np.clip(seen, 1, self._days)
        self.last = np.where(known, values, self.last)
        gain = np.where(self.known, self._gain, 1.0) * known
        self.recent += gain * (values - self.recent)
        self.known |= known

    def _predict(self, numbers: NDArray[np.int64]) -> Floats:
        """Return every expert's forecast of these windows: [windows, experts, 2, models]."""
        slots = numbers % self._slots
        has_past = (self.days_seen[slots] > 0)[:, None]
        daily = np.where(has_past, self.mean[slots], self.last)
        paper = np.maximum(daily + has_past * self.correction, 0.0)
        difference = np.where(has_past & ~np.isnan(self.anchor), daily - self.anchor, 0.0)
        seasonal = np.maximum(self.last + 0.5 * difference, 0.0)
        last, recent = (np.broadcast_to(each, daily.shape) for each in (self.last, self.recent))
        return np.stack((last, paper, seasonal, daily, recent), axis=1)

    def _weigh(self) -> Floats:
        """Return the weights [leads, experts, 2, models]. Over the experts they add up to 1."""
        if self._only is not None:
            only = np.zeros(self.loss.shape)
            only[:, self._only] = 1.0
            return only
        best = self.loss.min(1, keepdims=True)
        share = np.where(self.loss > best, best / np.maximum(self.loss, 1e-300), 1.0)
        share **= 8
        weights: Floats = share / share.sum(1, keepdims=True)
        return weights

    def _margin(self) -> Floats:
        """Return the distance of the upper forecast from the average: [leads, models]."""
        return self.offset * self.spread / np.maximum(self.spread_weight, 1e-9)
