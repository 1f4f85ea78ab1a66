"""WarmServe as its paper has it (PAPER): whole replicas prewarmed by forecast, in groups that nest.

Where the paper is silent, or its formula has no value, what serves it best is taken; each such
place says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance
from warmserve_rt.sim.workload.arrivals import DAY

from .autoscaler import Autoscaler

WINDOW_S = 300.0
SCORE_BANDWIDTH = 32 * 2**30
MOST_MODELS = 30  # on one device


@dataclass(eq=False)
class Replica:
    """A whole model on devices that no instance has to itself, in the order of its ranks."""

    model: int
    devices: tuple[Device, ...]
    score: float

    def overlaps(self, devices: Iterable[Device]) -> bool:
        return not set(self.devices).isdisjoint(devices)

    def nests(self, devices: tuple[Device, ...]) -> bool:
        """Whether they are the same set, or one contains the other, or they have none in common."""
        mine, others = set(self.devices), set(devices)
        return mine <= others or mine >= others or mine.isdisjoint(others)


class WarmServe(Autoscaler):
    """Prewarms for the coming window on devices that serve nobody and in what draining instances
    lend. ``window``: seconds of the windows that it forecasts; ``begin`` raises ValueError for a
    workload whose history has others. ``scaling``: see Autoscaler.

    The rest take a part of it away, to see what that part is worth. ``prewarm=False``: nothing
    loads before its start, and the weights of an instance go when it stops. ``placement=False``: a
    replica goes to the first devices with room, whatever is there, and need not nest with it.
    ``lending=False``: a draining instance keeps its KV cache whole.
    """

    def __init__(
        self,
        *,
        window: float = WINDOW_S,
        prewarm: bool = True,
        placement: bool = True,
        lending: bool = True,
        **scaling: Any,
    ) -> None:
        super().__init__(**scaling)
        self.window = window
        self.prewarm, self.placement, self.lending = prewarm, placement, lending

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.forecaster = Forecaster(
            len(fleet.profiles),
            window=self.window,
            horizons=(self.window,),
            period=DAY,
            expert="paper",
        )
        averages, peaks = fleet.workload.concurrency_history()
        if len(averages):
            history_window = fleet.workload.history_window
            if history_window != self.window:
                raise ValueError(
                    f"a history in windows of {history_window:g} s, and {self.window:g} s are "
                    "forecast: they are to be the same"
                )
            self.forecaster.observe_windows(-self.window * len(averages), averages, peaks)
        self.replicas: list[Replica] = []  # the first prewarmed first
        self.whole_kv: dict[Instance, float] = {}  # of draining ones, before they lent any
        self.place()

    def arrived(self, request: int, model: int) -> None:
        super().arrived(request, model)
        self.observe(model)

    def finished(self, instance: Any, request: int) -> None:
        super().finished(instance, request)
        self.observe(instance.model)
        if self.lending and instance.draining and instance.work:
            self.lend(instance)

    def observe(self, model: int) -> None:
        self.forecaster.observe(model, self.fleet.now, self.concurrent[model])

    def control(self) -> None:
        super().control()
        self.place()

    # How many replicas, and their scores.

    def wanted(self) -> list[Replica]:
        """New replicas, the highest score first. Those that are there count as the first of their
        model, and get the scores of these; one more than are wanted has score 0.

        The paper forecasts windows; the window here begins now, which at a window's beginning is
        the same. It divides by an average that may be 0; then a burst's factor is 1.
        That replicas which are there are scored again, it does not say: they give way to better
        ones the sooner.
        """
        forecast = self.forecaster.forecast(self.fleet.now, self.window)
        found = []
        for model, profile in enumerate(self.fleet.profiles):
            running = len(self.serving(model))
            average = float(forecast.average[model])
            peak = float(forecast.peak[model])
            foundation = max(math.ceil(average / profile.batch) - running, 0)
            burst = max(math.ceil(peak / profile.batch) - running - foundation, 0)
            n = foundation + burst
            scores = [math.exp(-i / n) * profile.nbytes / SCORE_BANDWIDTH for i in range(n)]
            for i in range(foundation, n):
                scores[i] *= peak / average if average > 0 else 1.0
            there = [replica for replica in self.replicas if replica.model == model]
            for i, replica in enumerate(there):
                replica.score = scores[i] if i < n else 0.0
            found += [Replica(model, (), score) for score in scores[len(there) :]]
        found.sort(key=lambda replica: -replica.score)
        return found

    # Placement.

    def place(self) -> None:
        """One that fits nowhere is skipped; nothing is evicted to make room."""
        if not self.prewarm:
            return
        for replica in self.wanted():
            group = self.group_for(replica) if self.placement else self.first_fit(replica)
            if group is None:
                continue
            replica.devices = group
            layers = len(self.fleet.profiles[replica.model].layer_bytes)
            for rank, device in enumerate(group):
                self.fleet.prewarm(device, replica.model, rank, layers, priority=replica.score)
            self.replicas.append(replica)

    def group_for(self, new: Replica) -> tuple[Device, ...] | None:
        """Of the groups with room that nest with all that is there, one on which the new replica
        scores above all that it overlaps, with the least sum of theirs; else the least sum.

        Of equals an aligned one, which whatever comes later nests with: the paper does not say.
        """
        profile = self.fleet.profiles[new.model]
        best, best_rank = None, (True, math.inf, True)
        for node in self.fleet.links.nodes:
            there = [replica for replica in self.replicas if replica.overlaps(node)]
            room = [device for device in node if self.fits(device, new.model, profile.nbytes)]
            for group in combinations(room, profile.width):
                others = [replica for replica in there if replica.overlaps(group)]
                if not all(other.nests(group) for other in others):
                    continue
                scores = [other.score for other in others]
                lost = any(score >= new.score for score in scores)
                rank = (lost, sum(scores), not aligned(group))
                if rank < best_rank:
                    best, best_rank = group, rank
        return best

    def first_fit(self, new: Replica) -> tuple[Device, ...] | None:
        """The first devices of a node that have room."""
        profile = self.fleet.profiles[new.model]
        for node in self.fleet.links.nodes:
            room = [device for device in node if self.fits(device, new.model, profile.nbytes)]
            if len(room) >= profile.width:
                return tuple(room[: profile.width])
        return None

    def fits(self, device: Device, model: int, nbytes: int) -> bool:
        if device.instance is not None and not device.instance.draining:
            return False
        if any(key[0] == model for key in device.shards) or len(device.shards) >= MOST_MODELS:
            return False
        return device.used + nbytes <= self.fleet.hardware.memory

    # Starting an instance.

    def choose(self, model: int) -> tuple[Device, ...] | None:
        """The first prewarmed group that is free, a loaded one before one that loads; else the free
        devices that the fewest replicas overlap.

        Of the latter aligned groups come first, so that what is prewarmed later finds groups too;
        the paper looks at all sets alike.
        """
        loading = None
        for replica in self.replicas:
            if replica.model == model and all(d.instance is None for d in replica.devices):
                shards = [d.shards[model, rank] for rank, d in enumerate(replica.devices)]
                if all(shard.resident >= shard.ends[-1] for shard in shards):
                    return replica.devices
                loading = loading or replica.devices
        if loading:
            return loading
        return min(self.free_groups(self.fleet.profiles[model].width), key=self.loss, default=None)

    def loss(self, devices: tuple[Device, ...]) -> int:
        """Replicas that a start there destroys."""
        return sum(replica.overlaps(devices) for replica in self.replicas)

    def loose_groups(self, width: int) -> list[tuple[Device, ...]]:
        free = ([d for d in node if d.instance is None] for node in self.fleet.links.nodes)
        return [group for devices in free for group in combinations(devices, width)]

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        """Whatever else is prewarmed there is lost, on all devices of each such replica; the rest
        of the memory becomes KV cache."""
        for replica in [r for r in self.replicas if r.overlaps(devices)]:
            self.replicas.remove(replica)
            if replica.model == model and replica.devices == devices:
                continue
            for rank, device in enumerate(replica.devices):
                self.fleet.keep(device, device.shards[replica.model, rank], 0)
        super().start(model, devices)

    # Memory.

    def drain(self, instance: Instance) -> None:
        self.whole_kv[instance] = instance.kv_room
        if self.lending:
            self.lend(instance)

    def lend(self, instance: Instance) -> None:
        """A draining instance keeps C Q / 32 blocks of its KV cache of C, for Q requests, and never
        less than those have."""
        used = instance.kv_tokens * instance.profile.kv_token_bytes
        share = self.whole_kv[instance] * instance.work / instance.profile.batch
        keep = min(instance.kv_room, max(used, share))
        if keep < instance.kv_room:
            self.fleet.lend(instance, keep)

    def stop(self, instance: Instance) -> None:
        """Its weights stay where they are, as a replica, if they nest with the others: the paper
        does not say, and it costs nothing."""
        self.whole_kv.pop(instance)
        keep = self.prewarm and self.keeps(instance)
        if keep:
            self.replicas.append(Replica(instance.model, instance.devices, 0.0))
        self.fleet.stop(instance, drop=not keep)
        self.start_waiting()
        self.place()

    def keeps(self, instance: Instance) -> bool:
        """Whether its weights can stay as a replica."""
        others = [replica for replica in self.replicas if replica.overlaps(instance.devices)]
        return all(
            other.model != instance.model and (other.nests(instance.devices) or not self.placement)
            for other in others
        )


def aligned(group: tuple[Device, ...]) -> bool:
    """Whether it is one of those into which a node divides evenly."""
    first = group[0].index
    return not first % len(group) and group[-1].index == first + len(group) - 1
