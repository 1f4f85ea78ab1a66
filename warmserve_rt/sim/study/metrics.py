"""What a run came to, in numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from warmserve_rt.policy import slo as policy
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload.workloads import Workload

Floats = NDArray[np.float64]


class Slo(policy.Slo):
    """Of the requests of a workload."""

    def bounds(self, workload: Workload) -> Floats:
        """Seconds that each request has."""
        return self.prefills * prefills(workload) + self.seconds

    def check(self, workload: Workload) -> None:
        """Raises ValueError for one that a request could not meet with its whole model resident and
        nobody before it."""
        least, bounds = prefills(workload), self.bounds(workload)
        missed = np.flatnonzero(bounds < least)
        if len(missed):
            worst = missed[np.argmin(bounds[missed] - least[missed])]
            raise ValueError(
                f"an SLO of {self.prefills:g} prefills and {self.seconds:g} s is impossible: "
                f"{workload.models[workload.model[worst]].name} would have "
                f"{bounds[worst]:.3g} s for a prefill of {least[worst]:.3g} s"
            )


@dataclass(frozen=True)
class RunSummary:
    """Of one run. Times to first token in seconds, infinite for a request that never had one;
    quantiles by nearest rank: the least time that this share of requests is at or below.

    ``slo_miss``: share of requests over the SLO. ``hit_share``: of the layers that starts needed,
    those that were there when they began; NaN without a start. ``wasted_bytes``: loaded in the
    background and never used. ``gpu_hours``: of devices that had an instance. ``link_use``: bytes
    loaded over what all host links could have carried until the end of the run.
    """

    requests: int
    unserved: int
    ttft_mean: float
    ttft_p50: float
    ttft_p95: float
    ttft_p99: float
    slo_miss: float
    hit_share: float
    loaded_bytes: float
    wasted_bytes: float
    gpu_hours: float
    starts: int
    link_use: float


def prefills(workload: Workload) -> Floats:
    """Seconds of each request's prefill, with every layer resident."""
    fixed = np.array([model.prefill_s for model in workload.models])
    token = np.array([model.prefill_token_s for model in workload.models])
    return fixed[workload.model] + token[workload.model] * workload.prompt


def times_to_first_token(fleet: Fleet) -> Floats:
    """Of each request, in seconds; infinite where it never came."""
    waits = fleet.first_token - fleet.workload.time
    return np.where(np.isnan(waits), np.inf, waits)


def quantile(ascending: Floats, share: float) -> float:
    """By nearest rank, which infinite values leave defined."""
    return float(ascending[max(0, math.ceil(share * len(ascending)) - 1)])


def summary(fleet: Fleet, slo: Slo | None = None) -> RunSummary:
    """Of a fleet that has run. Raises ValueError for a workload without requests."""
    ttft = times_to_first_token(fleet)
    if not len(ttft):
        raise ValueError("no requests, no times to first token")
    ascending = np.sort(ttft)
    hardware, end = fleet.hardware, fleet.events.now
    missed = ttft > (slo or Slo()).bounds(fleet.workload)
    return RunSummary(
        requests=len(ttft),
        unserved=int(np.isinf(ttft).sum()),
        ttft_mean=float(ttft.mean()),
        ttft_p50=quantile(ascending, 0.50),
        ttft_p95=quantile(ascending, 0.95),
        ttft_p99=quantile(ascending, 0.99),
        slo_miss=float(missed.mean()),
        hit_share=fleet.start_hits / fleet.start_layers if fleet.start_layers else math.nan,
        loaded_bytes=float(fleet.links.loaded),
        wasted_bytes=float(fleet.wasted),
        gpu_hours=fleet.device_seconds / 3600,
        starts=fleet.starts,
        link_use=fleet.links.loaded / (hardware.bandwidth * hardware.devices * end),
    )
