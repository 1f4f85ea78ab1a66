"""Track the demand for models, and value their layers by it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np

from ._arrays import F64
from .curve import ValueCurve, value_curve
from .forecast import Forecaster
from .profile import ModelProfile
from .rates import RecentRate, start_rates
from .slo import Slo

MOST_INSTANCES = 4  # instances of one model whose starts are counted
PROMPTS = 64  # recent prompts that are remembered; QUANTILES of them stand for all
QUANTILES = (np.arange(8) + 0.5) / 8
TYPICAL = (128, 256, 384, 512, 640, 768, 896, 1024)  # prompt tokens assumed before any arrive
# If h < s, a forecast h seconds ahead in windows of s seconds blends in the current level with the
# weight 1 - h / s. A model that is requested once an hour is nearly always idle. With s = 300 a
# forecast of 60 s therefore sees a fifth of its rate, and one of 120 s two fifths. With 300 s more
# starts were late under bursts of load.
SHORTEST_FORECAST_S = 120.0


class Demand:
    """The arrivals, prompts and forecasts of models, and the rates, curves and needs they imply.

    Parameters
    ----------
    profiles
        The profiles of the models.
    forecaster
        The forecaster of the same models, in the same order.
    service
        Seconds that a request of each model takes.
    bandwidth
        Bytes per second to one device, from the tier below its memory.
    delay
        Seconds of a start besides loading and computing.
    slo
        The bound on the first token.
    objective
        See `value_curve`.
    memory
        Seconds over which the rate of recent arrivals decays to 1/e.
    recent
        The weight of the recent arrivals in the rates, 0 to 1; the forecast has the rest.
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
        self._tier_densities: dict[tuple[int, int, float], F64] = {}  # since value() or arrange()

    def arrange(
        self, profiles: Sequence[ModelProfile], service: Sequence[float], rows: Sequence[int | None]
    ) -> None:
        """Replace the models. The forecaster is arranged by name.

        Parameters
        ----------
        profiles
            The profiles of the models.
        service
            Seconds that a request of each model takes.
        rows
            For each model its number before this call, whose history it keeps, or None if the
            model is new.
        """
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
        self._tier_densities.clear()
        self._lose()

    def arrived(self, model: int, now: float, concurrent: int, prompt: int) -> None:
        """Record that a request of ``prompt`` tokens has arrived, so that the model now has
        ``concurrent`` requests."""
        self.arrivals[model].arrived(now)
        self.prompts[model].append(prompt)
        self.forecaster.observe(model, now, concurrent)

    def finished(self, model: int, now: float, concurrent: int) -> None:
        """Record that a request has ended, so that the model now has ``concurrent`` requests."""
        self.forecaster.observe(model, now, concurrent)

    def forecast(self, now: float, horizon: float) -> None:
        """Update ``rates``, the requests per second of each model.

        A rate is the weighted mean of the recent arrival rate and the forecast. By Little's law the
        forecast rate is the forecast of concurrent requests over the service time.
        """
        average = self.forecaster.forecast(now, max(horizon, SHORTEST_FORECAST_S)).average
        self.rates = [
            self.recent * arrivals.at(now) + (1 - self.recent) * float(expected) / service
            for arrivals, expected, service in zip(
                self.arrivals, average, self.service, strict=True
            )
        ]

    def value(self) -> None:
        """Update ``curves`` and ``lost`` from the recent prompts.

        ``lost``: for each model and each number k of held layers, the seconds that a start loses
        against a start with all layers.
        """
        self.curves = [
            self._curve(profile, np.quantile(prompts, QUANTILES))
            for profile, prompts in zip(self.profiles, self.prompts, strict=True)
        ]
        self._tier_densities.clear()
        self._lose()

    def _lose(self) -> None:
        self.lost = [(curve.value[-1] - curve.value).tolist() for curve in self.curves]

    def tier_density(self, model: int, resident: int, below: float) -> F64:
        """Return for each layer [L] the seconds that it saves per expected start and byte if it
        loads at ``bandwidth``.

        Parameters
        ----------
        model
            The number of the model.
        resident
            The number of leading layers that the device holds at the start. Their density is 0.
        below
            Bytes per second at which other layers load.
        """
        key = model, resident, below
        found = self._tier_densities.get(key)
        if found is None:
            profile = self.profiles[model]
            found = self._tier_densities[key] = np.zeros(len(profile.layer_bytes))
            if resident < len(found):
                prompts = np.quantile(self.prompts[model], QUANTILES)
                curve = self._curve(profile, prompts, below, tier=self.bandwidth, resident=resident)
                found[resident:] = curve.density
        return found

    def _curve(
        self,
        profile: ModelProfile,
        prompts: F64,
        bandwidth: float | None = None,
        *,
        tier: float = math.inf,
        resident: int = 0,
    ) -> ValueCurve:
        """Return the mean of the value curves of these prompts; see `value_curve`."""
        value = np.zeros(len(profile.layer_bytes) + 1 - resident)
        for tokens in prompts.tolist():
            curve = value_curve(
                profile,
                bandwidth or self.bandwidth,
                tokens,
                budget_s=max(self.slo.budget(profile.prefill(tokens)) - self.delay, 0.0),
                objective=self.objective,
                tier=tier,
                resident=resident,
            )
            value += curve.value / len(prompts)
        return ValueCurve(profile.name, profile.width, curve.nbytes, value)

    def need(self, horizon: float) -> F64:
        """Return the need of each model: the starts expected within ``horizon`` seconds.

        A start is weighted by one plus the requests that would arrive while it loads from nothing.
        """
        found = np.zeros(len(self.profiles))
        for model, profile in enumerate(self.profiles):
            rate = self.rates[model]
            starts = sum(
                start_rates(rate, rate * self.service[model], profile.batch, MOST_INSTANCES)
            )
            found[model] = starts * horizon * (1.0 + rate * self.lost[model][0])
        return found

    def urgency(self, model: int, running: int, seconds: float) -> float:
        """Return the probability that the model needs one instance more than ``running`` within
        ``seconds``."""
        rate = self.rates[model]
        if running:
            concurrent, batch = rate * self.service[model], self.profiles[model].batch
            rate = start_rates(rate, concurrent, batch, running + 1)[running]
        return 1.0 - math.exp(-rate * seconds)
