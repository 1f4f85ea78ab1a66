"""Compute the numbers of a run."""

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
    """The bound on the first tokens of a workload's requests."""

    def bounds(self, workload: Workload) -> Floats:
        """Return the seconds that each request may take to its first token."""
        return self.prefills * prefills(workload) + self.seconds

    def check(self, workload: Workload) -> None:
        """Raise ValueError if some request could not meet the bound even with its whole model
        resident and no request before it."""
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
    """The numbers of one run.

    Times to first token are in seconds, and infinite for a request without a first token. Quantiles
    are by nearest rank: the smallest time such that this share of requests is at or below it.

    ``slo_miss``: the share of requests beyond the SLO. ``hit_share``: the share of the layers
    needed by starts that were resident when the start began; NaN without a start.
    ``wasted_bytes``: bytes that were loaded in the background and never used. ``gpu_hours``: hours
    of devices with an instance. ``link_use``: bytes loaded over the bytes that all host links could
    have carried until the end of the run.
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
    """Return the seconds of each request's prefill if all layers are resident."""
    fixed = np.array([model.prefill_s for model in workload.models])
    token = np.array([model.prefill_token_s for model in workload.models])
    return fixed[workload.model] + token[workload.model] * workload.prompt


def times_to_first_token(fleet: Fleet) -> Floats:
    """Return each request's time to first token in seconds; infinite without a first token."""
    waits = fleet.first_token - fleet.workload.time
    return np.where(np.isnan(waits), np.inf, waits)


def quantile(ascending: Floats, share: float) -> float:
    """Return a quantile by nearest rank, which is defined for infinite values too.

    Parameters
    ----------
    ascending
        The values in rising order.
    share
        The share of values at or below the quantile.
    """
    return float(ascending[max(0, math.ceil(share * len(ascending)) - 1)])


def summary(fleet: Fleet, slo: Slo | None = None) -> RunSummary:
    """Return the numbers of a fleet that has run. Raise ValueError if there were no requests.

    Parameters
    ----------
    fleet
        The fleet.
    slo
        The bound on the first tokens; by default ``Slo()``.
    """
    ttft = times_to_first_token(fleet)
    if not len(ttft):
        raise ValueError("no requests: a summary needs at least one")
    ascending = np.sort(ttft)
    hardware, end = fleet.hardware, fleet.clock.now
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
        loaded_bytes=float(fleet.links.loaded_bytes),
        wasted_bytes=float(fleet.memory.wasted_bytes),
        gpu_hours=fleet.device_seconds / 3600,
        starts=fleet.starts,
        link_use=fleet.links.loaded_bytes / (hardware.bandwidth * hardware.devices * end),
    )
