"""WarmServe as in its paper (PAPER): whole replicas are prewarmed by forecast, in nested groups.

If the paper does not specify a step, or its formula is undefined, the choice that serves WarmServe
best is taken. The comments mark each such choice.
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
MAX_MODELS = 30  # the largest number of models on one device


@dataclass(eq=False)
class Replica:
    """A whole prewarmed model. ``devices``: in the order of its ranks; no instance owns them."""

    model: int
    devices: tuple[Device, ...]
    score: float

    def overlaps(self, devices: Iterable[Device]) -> bool:
        return not set(self.devices).isdisjoint(devices)

    def nests(self, devices: tuple[Device, ...]) -> bool:
        """Return whether the sets of devices are equal, contain each other or are disjoint."""
        mine, others = set(self.devices), set(devices)
        return mine <= others or mine >= others or mine.isdisjoint(others)


class WarmServe(Autoscaler):
    """A controller that prewarms for the coming window, on devices without instances and in memory
    that draining instances lend.

    ``prewarm``, ``placement`` and ``lending`` switch off parts of it, to measure their worth.

    Parameters
    ----------
    window
        Seconds of the windows that are forecast. ``begin`` raises ValueError if the history of the
        workload has other windows.
    prewarm
        If False, layers are loaded by starts only, and the weights of an instance are dropped when
        it stops.
    placement
        If False, a replica goes to the first devices with room, and need not nest with others.
    lending
        If False, a draining instance keeps its whole KV cache.
    scaling
        See Autoscaler.
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
                    f"the windows of the history ({history_window:g} s) must be those of the "
                    f"forecast ({self.window:g} s)"
                )
            self.forecaster.observe_windows(-self.window * len(averages), averages, peaks)
        self.replicas: list[Replica] = []  # in the order of prewarming
        self.full_kv: dict[Instance, float] = {}  # of draining instances, before they lent any
        self.place()

    def arrived(self, request: int, model: int) -> None:
        super().arrived(request, model)
        self.observe(model)

    def finished(self, instance: Instance, request: int) -> None:
        super().finished(instance, request)
        self.observe(instance.model)
        if self.lending and instance.draining and instance.request_count:
            self.lend(instance)

    def observe(self, model: int) -> None:
        self.forecaster.observe(model, self.fleet.now, self.concurrent[model])

    def control(self) -> None:
        super().control()
        self.place()

    # The number of replicas, and their scores.

    def wanted_replicas(self) -> list[Replica]:
        """Return new replicas, the highest score first, and score the existing ones again.

        Existing replicas count as the first of their model and get the scores of the first.
        Replicas beyond the wanted number have score 0.

        The paper forecasts windows. The window here begins now, which is the same at the beginning
        of a window. The paper divides by an average that may be 0; the factor of a burst is then 1.
        The paper does not specify that existing replicas are scored again; with it they give way
        to better ones earlier.
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
            present = [replica for replica in self.replicas if replica.model == model]
            for i, replica in enumerate(present):
                replica.score = scores[i] if i < n else 0.0
            found += [Replica(model, (), score) for score in scores[len(present) :]]
        found.sort(key=lambda replica: -replica.score)
        return found

    # Placement.

    def place(self) -> None:
        """Prewarm the wanted replicas. Skip those that do not fit; evict no layer for them."""
        if not self.prewarm:
            return
        for replica in self.wanted_replicas():
            group = self.group_for(replica) if self.placement else self.first_fit(replica)
            if group is None:
                continue
            replica.devices = group
            layers = len(self.fleet.profiles[replica.model].layer_bytes)
            for rank, device in enumerate(group):
                self.fleet.memory.prewarm(
                    device, replica.model, rank, layers, priority=replica.score
                )
            self.replicas.append(replica)

    def group_for(self, new: Replica) -> tuple[Device, ...] | None:
        """Return the group for a new replica among those with room that nest with all others.

        A group on which the new replica scores above all replicas that it overlaps is preferred;
        then the group with the smallest sum of overlapped scores. Among equals an aligned group is
        taken, because later replicas nest with it; the paper does not specify this.
        """
        profile = self.fleet.profiles[new.model]
        best, best_rank = None, (True, math.inf, True)
        for node in self.fleet.links.nodes:
            on_node = [replica for replica in self.replicas if replica.overlaps(node)]
            room = [device for device in node if self.has_room(device, new.model, profile.nbytes)]
            for group in combinations(room, profile.width):
                others = [replica for replica in on_node if replica.overlaps(group)]
                if not all(other.nests(group) for other in others):
                    continue
                scores = [other.score for other in others]
                lost = any(score >= new.score for score in scores)
                rank = (lost, sum(scores), not aligned(group))
                if rank < best_rank:
                    best, best_rank = group, rank
        return best

    def first_fit(self, new: Replica) -> tuple[Device, ...] | None:
        """Return the first devices of a node with room."""
        profile = self.fleet.profiles[new.model]
        for node in self.fleet.links.nodes:
            room = [device for device in node if self.has_room(device, new.model, profile.nbytes)]
            if len(room) >= profile.width:
                return tuple(room[: profile.width])
        return None

    def has_room(self, device: Device, model: int, nbytes: int) -> bool:
        """Return whether a replica of the model can go to the device."""
        if device.instance is not None and not device.instance.draining:
            return False
        if any(key[0] == model for key in device.shards) or len(device.shards) >= MAX_MODELS:
            return False
        return device.used + nbytes <= self.fleet.hardware.memory

    # Starting an instance.

    def choose(self, model: int) -> tuple[Device, ...] | None:
        """Return the first free prewarmed group, a loaded one before a loading one; otherwise the
        free devices that the fewest replicas overlap.

        Aligned groups are preferred among the latter, so that later replicas find groups; the paper
        treats all sets alike.
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
        return min(
            self.free_groups(self.fleet.profiles[model].width), key=self.replicas_lost, default=None
        )

    def replicas_lost(self, devices: tuple[Device, ...]) -> int:
        """Return the number of replicas that a start on these devices destroys."""
        return sum(replica.overlaps(devices) for replica in self.replicas)

    def unaligned_groups(self, width: int) -> list[tuple[Device, ...]]:
        free = ([d for d in node if d.instance is None] for node in self.fleet.links.nodes)
        return [group for devices in free for group in combinations(devices, width)]

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        """Start an instance. Replicas that overlap its devices are dropped from all their devices,
        and the rest of the memory becomes KV cache."""
        for replica in [r for r in self.replicas if r.overlaps(devices)]:
            self.replicas.remove(replica)
            if replica.model == model and replica.devices == devices:
                continue
            for rank, device in enumerate(replica.devices):
                self.fleet.memory.keep(device, device.shards[replica.model, rank], 0)
        super().start(model, devices)

    # Memory.

    def drain(self, instance: Instance) -> None:
        self.full_kv[instance] = instance.kv_room
        if self.lending:
            self.lend(instance)

    def lend(self, instance: Instance) -> None:
        """Lend KV cache of a draining instance: with Q requests it keeps C Q / 32 of its C blocks,
        and never less than the requests use."""
        used = instance.kv_tokens * instance.profile.kv_token_bytes
        share = self.full_kv[instance] * instance.request_count / instance.profile.batch
        keep = min(instance.kv_room, max(used, share))
        if keep < instance.kv_room:
            self.fleet.kv_caches.lend(instance, keep)

    def stop(self, instance: Instance) -> None:
        """Stop an instance. Its weights stay as a replica if they nest with the others; the paper
        does not specify this, and it costs nothing."""
        self.full_kv.pop(instance)
        keep = self.prewarm and self.can_keep(instance)
        if keep:
            devices = self.fleet.devices_of(instance)
            self.replicas.append(Replica(instance.model, devices, 0.0))
        self.fleet.stop(instance, drop=not keep)
        self.start_waiting()
        self.place()

    def can_keep(self, instance: Instance) -> bool:
        """Return whether the weights of an instance can stay as a replica."""
        devices = self.fleet.devices_of(instance)
        others = [replica for replica in self.replicas if replica.overlaps(devices)]
        return all(
            other.model != instance.model and (other.nests(devices) or not self.placement)
            for other in others
        )


def aligned(group: tuple[Device, ...]) -> bool:
    """Return whether a group is one of those into which a node divides evenly."""
    first = group[0].index
    return not first % len(group) and group[-1].index == first + len(group) - 1
