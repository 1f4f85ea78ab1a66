"""Static sharing, in the manner of MuxServe: models placed once and for all, several to a device.

Nothing ever starts or stops. Which models share devices is decided before the first request, from
the history of their load; see Tenant for how they slow each other down. MuxServe's own estimator
and its split of the cache between models are not reproduced: the cache goes to whoever asks first.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...dispatch import Dispatcher
from ..fleet import Fleet
from ..tenancy import Tenant
from .balance import Demand, Placed, balance


class Sharing(Dispatcher):
    """``interference``: see Tenant. Assumed: no source gives it for any two models, a comparison
    should vary it from 0 to 1. Models for which there is no room are refused."""

    def __init__(self, *, interference: float = 0.35) -> None:
        super().__init__()
        if not interference >= 0:
            raise ValueError(f"an interference of {interference}: it is not negative")
        self.interference: float | None = interference

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        placed = balance(demands(fleet), fleet.hardware)
        for each in placed:
            devices = fleet.devices[each.first : each.first + each.width]
            fleet.share(Tenant(fleet, each.model, tuple(devices), self.interference))
        self.placed: list[Placed] = placed

    def arrived(self, request: int, model: int) -> None:
        if self.fleet.instances[model]:
            super().arrived(request, model)
        else:
            self.fleet.refuse(request)

    def finished(self, instance: Any, request: int) -> None:
        """Its memory may be what another model of these devices waits for."""
        super().finished(instance, request)
        for model in {t.model: None for d in instance.devices for t in d.tenants}:
            if self.pending[model]:
                self.assign(model)

    def route(self, instances: Any, request: int) -> Any:
        """With the least to do before it; of equals the fullest, so that fewer disturb others."""
        now = self.fleet.now
        able = [i for i in instances if i.admits(request)]
        return min(able, key=lambda i: (i.backlog(now), -i.work), default=None)


class FixedShares(Sharing):
    """Each model has a fixed part of its devices' compute, busy neighbours or not, as percentages
    of an MPS server divide them."""

    def __init__(self) -> None:
        super().__init__()
        self.interference = None


def demands(fleet: Fleet) -> list[Demand]:
    """What the history says of each model; without one, that all are alike."""
    models = len(fleet.profiles)
    averages, peaks = fleet.workload.concurrency_history()
    if not len(averages):
        averages = peaks = np.ones((1, models))
    return [
        Demand(profile, float(average), float(peak), float(average / service))
        for profile, average, peak, service in zip(
            fleet.profiles,
            np.nan_to_num(np.nanmean(averages, axis=0)),
            np.nan_to_num(np.nanmean(peaks, axis=0)),
            fleet.workload.service,
            strict=True,
        )
    ]
