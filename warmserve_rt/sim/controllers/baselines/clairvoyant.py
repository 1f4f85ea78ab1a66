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

SIGHT_S = 120.0
SOON_S = 20.0


class KnownDemand(Demand):
    """A demand that counts future requests in place of a forecast."""

    fleet: Fleet
    arrivals_to_come: list[Any]

    def forecast(self, now: float, horizon: float) -> None:
        self.next = []
        self.rates = []
        for times in self.arrivals_to_come:
            begin, end = np.searchsorted(times, (now, now + SIGHT_S), side="right")
            self.rates.append((end - begin) / SIGHT_S)
            self.next.append(float(times[begin]) - now if begin < end else math.inf)

    def need(self, horizon: float) -> Any:
        """Return the need at the known rate, or more if no instance could take the next request."""
        found = super().need(horizon)
        for model, wait in enumerate(self.next):
            if not any(i.work or not i.loaded for i in self.fleet.instances[model]):
                found[model] = max(found[model], math.exp(-wait / SOON_S))
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
        known.arrivals_to_come = [
            workload.time[workload.model == model] for model in range(len(fleet.profiles))
        ]
        return known
