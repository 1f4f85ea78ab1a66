"""Static sharing, in the manner of MuxServe: models are placed once, several to a device.

No instance starts or stops later. The placement is decided before the first request from the
history of the load; `Hardware` tells how neighbours slow each other down. MuxServe's own estimator
and its split of the cache between models are not reproduced: the first request gets the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from warmserve_rt.sim.controllers.dispatcher import Dispatcher
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance

from .balance import ModelLoad, PlacedCopy, place_copies


class StaticSharing(Dispatcher):
    """A controller that places models once. It refuses the requests of models without room."""

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.placed: list[PlacedCopy] = place_copies(model_loads(fleet), fleet.hardware)
        for each in self.placed:
            fleet.start(each.model, fleet.devices[each.first : each.first + each.width])

    def arrived(self, request: int, model: int) -> None:
        if self.fleet.instances[model]:
            super().arrived(request, model)
        else:
            self.fleet.refuse(request)

    def route(self, instances: Sequence[Instance], request: int) -> Instance | None:
        """Return the instance with the smallest backlog, or the fullest of equals, so that fewer
        instances compute."""
        now = self.fleet.now
        candidates = [i for i in instances if i.loaded and self.fleet.kv_caches.reserve(i, request)]
        return min(candidates, key=lambda i: (i.backlog(now), -i.request_count), default=None)


def model_loads(fleet: Fleet) -> list[ModelLoad]:
    """Return the load of each model in the history, or equal loads without a history."""
    models = len(fleet.profiles)
    averages, peaks = fleet.workload.concurrency_history()
    if not len(averages):
        averages = peaks = np.ones((1, models))
    return [
        ModelLoad(profile, float(average), float(peak), float(average / service))
        for profile, average, peak, service in zip(
            fleet.profiles,
            np.nan_to_num(np.nanmean(averages, axis=0)),
            np.nan_to_num(np.nanmean(peaks, axis=0)),
            fleet.workload.service,
            strict=True,
        )
    ]
