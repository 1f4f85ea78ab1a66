"""Plan which layers the host tiers of a fleet hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.demand import Demand
from warmserve_rt.policy.improve import Copy
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.policy.tier import fill_tier

from .protocols import Fleet, HostTier


@dataclass(frozen=True)
class HostPlan:
    """The layers that one host tier holds.

    ``values``: by model the value of each layer, 0 if it is not held. ``before``: by model the
    number of layers that the tier held before. ``starts``: by model the starts expected on the
    devices of the tier.
    """

    host: HostTier
    values: dict[int, F64]
    before: dict[int, int]
    starts: dict[int, float]


def plan_host(
    fleet: Fleet,
    host: HostTier,
    copies: Sequence[Copy],
    need: F64,
    demand: Demand,
    *,
    margin: float,
) -> HostPlan:
    """Return the plan of one host tier.

    The value of a layer is the seconds that the expected starts save if it loads at the speed of
    the tier and not at that of the files. A start on a copy loads the layers after those of the
    copy; another start loads all layers.

    Parameters
    ----------
    fleet
        The fleet of the tier.
    host
        The tier.
    copies
        The copies that the devices hold by the plan.
    need
        The need of each model, as :meth:`Demand.need` returns it.
    demand
        Tells the seconds that layers save.
    margin
        See :func:`fill_tier`.
    """
    mine = set(host.devices)
    near: dict[int, list[Copy]] = {}
    served = np.zeros(len(need))
    for copy in copies:
        served[copy.model] += copy.use
        if not mine.isdisjoint(range(copy.first, copy.first + fleet.profiles[copy.model].width)):
            near.setdefault(copy.model, []).append(copy)
    models = [model for model in range(len(need)) if need[model] > 0]
    density, nbytes, starts = [], [], {}
    for model in models:
        profile = fleet.profiles[model]
        ranks = min(profile.width, len(mine))
        below = _file_speed(fleet, host, model)
        share = min(max(profile.width, len(mine)) / len(fleet.devices), 1.0)
        found = [(copy.use, copy.layers) for copy in near.get(model, ())]
        found.append((max(1.0 - float(served[model]), 0.0) * share, 0))
        starts[model] = float(need[model]) * sum(weight for weight, _ in found)
        saved = np.zeros(len(profile.layer_bytes))
        for weight, layers in found:
            saved += weight * demand.tier_density(model, layers, below)
        density.append(float(need[model]) * saved)
        nbytes.append(np.array(profile.layer_bytes, np.int64) * ranks)
    held = [host.holds(model) for model in models]
    chosen = fill_tier(density, nbytes, held, host.nbytes, margin=margin)
    return HostPlan(
        host,
        {
            m: np.where(hold, worth, 0.0)
            for m, hold, worth in zip(models, chosen, density, strict=True)
        },
        {m: int(np.sum(layers)) for m, layers in zip(models, held, strict=True)},
        starts,
    )


def file_seconds(fleet: Fleet, host: HostTier, model: int) -> F64:
    """Return, for 0, 1, ..., L leading layers that a device holds, the seconds by which a start on
    the devices of a host tier is later because the tier does not hold every other layer [L+1].

    The result is an upper bound, because computing may hide a part of the loads.
    """
    profile = fleet.profiles[model]
    slower = 1 / _file_speed(fleet, host, model) - 1 / fleet.bandwidth
    missing = np.logical_not(host.holds(model)) * np.array(profile.layer_bytes) * slower
    return np.concatenate((np.cumsum(missing[::-1])[::-1], [0.0]))


def _file_speed(fleet: Fleet, host: HostTier, model: int) -> float:
    """Return the bytes per second to each of a model's devices of layers outside the tier."""
    together = min(fleet.profiles[model].width, len(host.devices))
    return min(fleet.bandwidth, host.file_bandwidth / together)


def explain_host(plan: HostPlan, profiles: Sequence[ModelProfile]) -> list[str]:
    """Return a sentence for each model that gains layers in a host tier.

    Parameters
    ----------
    plan
        The plan of the tier.
    profiles
        The profiles of the models.
    """
    devices = plan.host.devices
    where = f"device {devices[0]}" if len(devices) == 1 else f"devices {devices[0]}-{devices[-1]}"
    said = []
    for model, values in plan.values.items():
        layers = int((values > 0).sum())
        if layers > plan.before[model]:
            saved = 1e9 * float(values.sum()) / layers
            said.append(
                f"keeps {layers} of {len(values)} layers of {profiles[model].name} in host memory "
                f"of {where}: {plan.starts[model]:.2g} expected starts, {saved:.2g} ms saved per MB"
            )
    return said
