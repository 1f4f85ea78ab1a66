"""The table of policies that a simulation compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.controllers.baselines.all_resident import AllResident
from warmserve_rt.sim.controllers.baselines.blitzscale import BlitzScale
from warmserve_rt.sim.controllers.baselines.clairvoyant import Clairvoyant
from warmserve_rt.sim.controllers.baselines.lru import Lru
from warmserve_rt.sim.controllers.baselines.serverless import Serverless
from warmserve_rt.sim.controllers.baselines.sharing import StaticSharing
from warmserve_rt.sim.controllers.baselines.warmserve import WarmServe
from warmserve_rt.sim.core.fleet import Controller

from .autoscaling import SharedDeviceAutoscaler


@dataclass(frozen=True)
class Policy:
    """One policy of a comparison.

    Parameters
    ----------
    title
        Its name in reports.
    make
        Makes the controller; takes its options by name.
    engine_start
        Whether each start waits for an engine process.
    streaming, elastic_kv, partitioned
        See Fleet.
    polls
        Whether the starts of the fleet poll.
    unlimited_memory
        Whether the memory of devices is unlimited.
    multipath
        Whether foreground loads may use idle neighbours' links, if the hardware allows it.
    bound
        Whether the policy is a bound: it has memory or knowledge that no real policy has.
    """

    title: str
    make: Callable[..., Controller]
    engine_start: bool = False
    streaming: bool = False
    elastic_kv: bool = False
    partitioned: bool = False
    polls: bool = False
    unlimited_memory: bool = False
    multipath: bool = False
    bound: bool = False


def scheduled(
    scheduler: type[Scheduler] = Scheduler, *, share: bool = True, **options: Any
) -> SharedDeviceAutoscaler:
    """Return this project's own controller.

    Parameters
    ----------
    scheduler
        The class of its scheduler.
    share
        See SharedDeviceAutoscaler.
    options
        The options of the scheduler.
    """
    return SharedDeviceAutoscaler(scheduler(**options), share=share)


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "autoscaling": Policy("autoscaling, host-memory tier", Serverless, engine_start=True),
        "autoscaling-polls": Policy(
            "autoscaling, host-memory tier, polling",
            partial(Serverless, polls=True),
            engine_start=True,
            polls=True,
        ),
        "blitzscale": Policy("serving while loading", BlitzScale, streaming=True),
        "sharing": Policy("static sharing", StaticSharing, elastic_kv=True),
        "fixed-shares": Policy(
            "static sharing, fixed shares", StaticSharing, elastic_kv=True, partitioned=True
        ),
        "lru": Policy("whole-model LRU", Lru),
        "warmserve": Policy("WarmServe, event-driven", WarmServe),
        "warmserve-polls": Policy("WarmServe, polling", partial(WarmServe, polls=True), polls=True),
        "scheduler": Policy(
            "warmserve_rt", scheduled, streaming=True, elastic_kv=True, multipath=True
        ),
        "h1": Policy(
            "residency that knows 120 s (h1)",
            partial(scheduled, Clairvoyant),
            streaming=True,
            elastic_kv=True,
            multipath=True,
            bound=True,
        ),
        "h0": Policy(
            "all resident everywhere (h0)", AllResident, unlimited_memory=True, bound=True
        ),
    }
)


def find_policy(name: str) -> Policy:
    """Return the policy of this name. Raise ValueError if there is no such policy."""
    if name not in POLICIES:
        raise ValueError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    return POLICIES[name]
