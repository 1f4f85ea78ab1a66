"""h1: our controller with a residency that knows the requests of the next two minutes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from warmserve_rt.policy.demand import Demand
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.core.fleet import Fleet

LOOKAHEAD_S = 120.0  # seconds of known requests
URGENCY_S = 20.0  # seconds until the next request at which its weight is 1/e


class KnownDemand(Demand):
    """A demand that counts future requests in place of a forecast."""

    fleet: Fleet
    future_arrivals: list[Any]

    def forecast(self, now: float, horizon: float) -> None:
        self.waits = []
        self.rates = []
        for times in self.future_arrivals:
            begin, end = np.searchsorted(times, (now, now + LOOKAHEAD_S), side="right")
            self.rates.append((end - begin) / LOOKAHEAD_S)
            self.waits.append(float(times[begin]) - now if begin < end else math.inf)

    def need(self, horizon: float) -> Any:
        """Return the need at the known rate, or more if no instance could take the next request."""
        found = super().need(horizon)
        for model, wait in enumerate(self.waits):
            if not any(i.request_count or not i.loaded for i in self.fleet.instances[model]):
                found[model] = max(found[model], math.exp(-wait / URGENCY_S))
        return found


class Clairvoyant(Scheduler):
    """Our scheduler with known demand and a wider margin.

    The known requests of the next two minutes change at every request. As this is a bound, it gets
    the margin that serves it best (bench/policies.py: 0.95 % late instead of 1.4 %).
    """

    def __init__(self, *, margin: float = 1.0, **options: Any) -> None:
        super().__init__(margin=margin, **options)

    def make_demand(self, fleet: Any, forecaster: Forecaster, service: Sequence[float]) -> Demand:
        known = KnownDemand(
            fleet.profiles,
            forecaster,
            service,
            bandwidth=fleet.bandwidth,
            delay=fleet.switch_s + 0.01,
            slo=self.slo,
            objective=self.objective,
        )
        known.fleet = fleet.simulated
        workload = known.fleet.workload
        known.future_arrivals = [
            workload.time[workload.model == model] for model in range(len(fleet.profiles))
        ]
        return known
