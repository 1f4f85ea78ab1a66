"""What the simulator says of a live run: the same requests, scheduler, costs and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.controllers.autoscaling import Starts
from warmserve_rt.sim.controllers.dispatcher import Dispatcher
from warmserve_rt.sim.core.devices import KV_STEP, Hardware
from warmserve_rt.sim.core.fleet import LEAD_S, Fleet
from warmserve_rt.sim.study.metrics import times_to_first_token
from warmserve_rt.sim.workload.requests import Workload

from .traffic import forecaster

BEFORE_S = 2.0  # the first request, in which layers are brought in

# A simulated instance takes whole steps of KV cache from its device. The KV caches of the live run
# are not in the arena: with so many bytes for one, a step is less than a granule.
SCALE = 4096


@dataclass(frozen=True, slots=True)
class Outcome:
    """Of a run, simulated or not. ``ttft``: seconds [requests]; ``hits``: the share of layers that
    were there when the turn of their request came; ``loaded``: bytes."""

    ttft: npt.NDArray[np.float64]
    hits: float
    loaded: float

    def numbers(self) -> dict[str, float]:
        """For a report: milliseconds, shares and gigabytes."""
        p50, p95 = np.percentile(self.ttft, [50, 95]) * 1e3
        return {
            "ttft_mean_ms": round(float(self.ttft.mean()) * 1e3, 1),
            "ttft_p50_ms": round(float(p50), 1),
            "ttft_p95_ms": round(float(p95), 1),
            "layer_hits": round(self.hits, 3),
            "loaded_gb": round(self.loaded / 1e9, 2),
        }


class InProcess(Starts):
    """One model after another in one process: an instance is no more than its requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler, linger=0.0)

    def begin(self, fleet: Any) -> None:
        Dispatcher.begin(self, fleet)
        self.waiting: dict[int, None] = {}
        workload = fleet.workload

        def begin() -> None:
            self.scheduler.begin(fleet, forecaster(workload), workload.service)

        fleet.after(LEAD_S - BEFORE_S, begin)
        fleet.after(LEAD_S, self.tick)


def predict(
    workload: Workload, scheduler: Scheduler, *, arena: int, bandwidth: float, switch_s: float
) -> Outcome:
    """Of the requests on one device with an ``arena`` of so many bytes. ``bandwidth``: bytes a
    second into it, ``switch_s``: of a start beside loading and computing."""
    models = tuple(
        replace(profile, layer_bytes=tuple(SCALE * nbytes for nbytes in profile.layer_bytes))
        for profile in workload.models
    )
    hardware = Hardware(
        devices=1,
        node_devices=1,
        memory=float(arena) * SCALE + 2 * KV_STEP,
        bandwidth=bandwidth * SCALE,
    )
    fleet = Fleet(
        replace(workload, models=models),
        hardware,
        InProcess(scheduler),
        switch_s=switch_s,
        streaming=True,
        elastic_kv=True,
    )
    fleet.run()
    # A request that follows another of its model finds all layers, and starts nothing.
    layers = len(models[0].layer_bytes) * len(workload.time)
    hits = layers - fleet.start_layers + fleet.start_hits
    return Outcome(times_to_first_token(fleet), hits / layers, fleet.links.loaded / SCALE)
