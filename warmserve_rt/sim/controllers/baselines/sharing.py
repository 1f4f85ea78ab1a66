"""Static sharing, in the manner of MuxServe: models are placed once, several to a device.

No instance starts or stops later. The placement is decided before the first request from the
history of the load; `Hardware` tells how neighbours slow each other down. MuxServe's own estimator
and its split of the cache between models are not reproduced: the first request gets the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from warmserve_rt.sim.controllers.dispatcher import Dispatcher
from warmserve_rt.sim.core.fleet import Fleet

from .balance import Demand, Placed, balance


class Sharing(Dispatcher):
    """A controller that places models once. It refuses the requests of models without room."""

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.placed: list[Placed] = balance(demands(fleet), fleet.hardware)
        for each in self.placed:
            fleet.start(each.model, fleet.devices[each.first : each.first + each.width])

    def arrived(self, request: int, model: int) -> None:
        if self.fleet.instances[model]:
            super().arrived(request, model)
        else:
            self.fleet.refuse(request)

    def route(self, instances: Any, request: int) -> Any:
        """Return the instance with the smallest backlog, the fullest of equals: fewer then work."""
        now = self.fleet.now
        able = [i for i in instances if i.loaded and self.fleet.reserve(i, request)]
        return min(able, key=lambda i: (i.backlog(now), -i.work), default=None)


def demands(fleet: Fleet) -> list[Demand]:
    """Return the demand for each model in the history, or equal demands without a history."""
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
