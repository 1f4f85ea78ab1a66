"""What models are asked for, and what holding their layers is worth for it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from ._greedy import F64
from .curve import ValueCurve, value_curve
from .forecast import Forecaster
from .profile import ModelProfile
from .rates import RecentRate, start_rates
from .slo import Slo

MOST_INSTANCES = 4  # of one model, whose starts are counted
PROMPTS = 64  # recent prompts, of which QUANTILES stand for all
QUANTILES = (np.arange(8) + 0.5) / 8
TYPICAL = (128, 256, 384, 512, 640, 768, 896, 1024)  # tokens, until prompts have come
# Within a window of s seconds a forecast h seconds ahead is (1 - h / s) the requests of now, and a
# model that is asked for once in an hour has none nearly always. Of a window of 300 s, 60 s leave
# it a fifth of its rate and 120 s two fifths; with 300 s more starts were late where load comes in
# bursts.
SHORTEST_FORECAST_S = 120.0


class Demand:
    """Arrivals, prompts and forecasts of some models, and what comes of them.

    ``service``: seconds that a request of each model takes. ``bandwidth``: bytes per second to one
    device, ``delay``: seconds of a start beside loading and computing. ``objective``: see
    `value_curve`. ``memory``: seconds for which arrivals are recent; ``recent``: their weight
    beside the forecast's.
    """

    def __init__(
        self,
        profiles: Sequence[ModelProfile],
        forecaster: Forecaster,
        service: Sequence[float],
        *,
        bandwidth: float,
        delay: float = 0.0,
        slo: Slo | None = None,
        objective: float | str = 0.5,
        memory: float = 120.0,
        recent: float = 0.5,
    ) -> None:
        self.profiles, self.forecaster, self.service = profiles, forecaster, service
        self.bandwidth, self.delay, self.objective = bandwidth, delay, objective
        self.slo = slo or Slo()
        self.recent, self.memory = recent, memory
        self.arrivals = [RecentRate(memory) for _ in profiles]
        self.prompts = [deque[int](TYPICAL, PROMPTS) for _ in profiles]
        self.rates = [0.0] * len(profiles)
        self.curves: list[ValueCurve] = []
        self.lost: list[list[float]] = []

    def arrange(
        self, profiles: Sequence[ModelProfile], service: Sequence[float], rows: Sequence[int | None]
    ) -> None:
        """Goes on with these models: the i-th has the past of the one that was ``rows[i]``-th, or
        none. The forecaster is arranged by name."""
        self.forecaster.arrange([profile.name for profile in profiles])
        self.profiles, self.service = profiles, service
        arrivals, prompts, rates, curves = self.arrivals, self.prompts, self.rates, self.curves
        self.arrivals = [RecentRate(self.memory) if r is None else arrivals[r] for r in rows]
        self.prompts = [deque(TYPICAL, PROMPTS) if r is None else prompts[r] for r in rows]
        self.rates = [0.0 if r is None else rates[r] for r in rows]
        self.curves = [
            self._curve(profile, np.quantile(asked, QUANTILES)) if r is None else curves[r]
            for profile, asked, r in zip(profiles, self.prompts, rows, strict=True)
        ]
        self._lose()

    def arrived(self, model: int, now: float, concurrent: int, prompt: int) -> None:
        """A request of ``prompt`` tokens has come, and that many are there now."""
        self.arrivals[model].arrived(now)
        self.prompts[model].append(prompt)
        self.forecaster.observe(model, now, concurrent)

    def finished(self, model: int, now: float, concurrent: int) -> None:
        """A request has ended, and that many are left."""
        self.forecaster.observe(model, now, concurrent)

    def forecast(self, now: float, horizon: float) -> None:
        """Renews ``rates``, requests per second of each model: what came lately, and by Little's
        law the concurrent requests that are forecast."""
        average = self.forecaster.forecast(now, max(horizon, SHORTEST_FORECAST_S)).average
        self.rates = [
            self.recent * arrivals.at(now) + (1 - self.recent) * float(expected) / service
            for arrivals, expected, service in zip(
                self.arrivals, average, self.service, strict=True
            )
        ]

    def value(self) -> None:
        """Renews ``curves``, and ``lost``: for each model the value that a start forgoes with k of
        its layers, in seconds, for the prompts that came lately."""
        self.curves = [
            self._curve(profile, np.quantile(prompts, QUANTILES))
            for profile, prompts in zip(self.profiles, self.prompts, strict=True)
        ]
        self._lose()

    def _lose(self) -> None:
        self.lost = [(curve.value[-1] - curve.value).tolist() for curve in self.curves]

    def _curve(self, profile: ModelProfile, prompts: F64) -> ValueCurve:
        value = np.zeros(len(profile.layer_bytes) + 1)
        for tokens in prompts.tolist():
            curve = value_curve(
                profile,
                self.bandwidth,
                tokens,
                budget_s=max(self.slo.budget(profile.prefill(tokens)) - self.delay, 0.0),
                objective=self.objective,
            )
            value += curve.value / len(prompts)
        return ValueCurve(profile.name, profile.width, curve.nbytes, value, curve.order)

    def need(self, horizon: float) -> F64:
        """Of each model: starts that are expected within ``horizon`` seconds, each counted with the
        requests that come while it would load from nothing."""
        found = np.zeros(len(self.profiles))
        for model, profile in enumerate(self.profiles):
            rate = self.rates[model]
            starts = sum(
                start_rates(rate, rate * self.service[model], profile.batch, MOST_INSTANCES)
            )
            found[model] = starts * horizon * (1.0 + rate * self.lost[model][0])
        return found

    def urgency(self, model: int, running: int, seconds: float) -> float:
        """The probability that it wants one instance more than ``running`` within that time."""
        rate = self.rates[model]
        if running:
            concurrent, batch = rate * self.service[model], self.profiles[model].batch
            rate = start_rates(rate, concurrent, batch, running + 1)[running]
        return 1.0 - math.exp(-rate * seconds)
