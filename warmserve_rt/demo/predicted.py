"""Simulates a live run: same requests, scheduler, costs and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.controllers.autoscaling import SharedDeviceAutoscaler
from warmserve_rt.sim.controllers.dispatcher import Dispatcher
from warmserve_rt.sim.controllers.scheduled import ScheduledFleet
from warmserve_rt.sim.core.devices import KV_STEP, Hardware
from warmserve_rt.sim.core.fleet import LEAD_S, Fleet
from warmserve_rt.sim.study.metrics import times_to_first_token
from warmserve_rt.sim.workload.requests import Workload

from .traffic import forecaster

BEFORE_S = 2.0  # prewarming time before the first request

# A simulated instance takes whole steps of KV cache from its device. The KV caches of the live run
# are not in the arena. Each byte is therefore simulated as SCALE bytes, so that a step of KV cache
# stands for less than a granule.
SCALE = 4096


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a run, simulated or real.

    Attributes
    ----------
    ttft : array [requests]
        Time to first token in seconds.
    hits : float
        The share of layers that were resident when serving of their request began.
    loaded : float
        Loaded bytes.
    """

    ttft: npt.NDArray[np.float64]
    hits: float
    loaded: float

    def numbers(self) -> dict[str, float]:
        """Return rounded numbers for a report: milliseconds, shares and gigabytes."""
        p50, p95 = np.percentile(self.ttft, [50, 95]) * 1e3
        return {
            "ttft_mean_ms": round(float(self.ttft.mean()) * 1e3, 1),
            "ttft_p50_ms": round(float(p50), 1),
            "ttft_p95_ms": round(float(p95), 1),
            "layer_hits": round(self.hits, 3),
            "loaded_gb": round(self.loaded / 1e9, 2),
        }


class InProcess(SharedDeviceAutoscaler):
    """Serves one model after another in one process: an instance ends with its requests."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(scheduler, idle_timeout_s=0.0)

    def begin(self, fleet: Any) -> None:
        Dispatcher.begin(self, fleet)
        self.waiting: dict[int, None] = {}
        workload = fleet.workload

        def begin() -> None:
            self.scheduler.begin(ScheduledFleet(fleet), forecaster(workload), workload.service)

        fleet.after(LEAD_S - BEFORE_S, begin)
        fleet.after(LEAD_S, self.stop_idle)


def predict(
    workload: Workload, scheduler: Scheduler, *, arena: int, bandwidth: float, switch_s: float
) -> Outcome:
    """Simulate the requests on one device and return the outcome.

    Parameters
    ----------
    workload : Workload
        The requests and the models' profiles.
    scheduler : Scheduler
        The scheduler; it is used up.
    arena : int
        Bytes of the arena.
    bandwidth : float
        Bytes per second into the arena.
    switch_s : float
        Seconds that a start takes besides loading and computing.
    """
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
    # A request that follows another of its model starts no instance and finds all layers resident.
    layers = len(models[0].layer_bytes) * len(workload.time)
    hits = layers - fleet.start_layers + fleet.start_hits
    return Outcome(times_to_first_token(fleet), hits / layers, fleet.links.loaded_bytes / SCALE)
