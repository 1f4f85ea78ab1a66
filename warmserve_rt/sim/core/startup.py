"""Start an instance: wait for the delays of a start, load the missing layers, and serve."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from .clock import Clock
from .devices import Device, Flow
from .instance import Instance
from .links import Links, arrival_times


@dataclass(frozen=True)
class StartDelays:
    """The delays of every start, in seconds. See Fleet for their meaning.

    Raises
    ------
    ValueError
        If ``switch_s`` or ``engine_start_s`` is negative or not finite.
    """

    switch_s: float
    engine_start_s: float
    server_poll_s: float
    mapping_poll_s: float

    def __post_init__(self) -> None:
        if not (0 <= self.switch_s < math.inf and 0 <= self.engine_start_s < math.inf):
            raise ValueError(
                "a start must take finite seconds of at least 0, "
                f"got {self.switch_s} s and {self.engine_start_s} s for an engine"
            )


class Startup:
    """The starts of a fleet's instances.

    Parameters
    ----------
    clock, devices, links
        The parts of the fleet.
    delays
        The delays of every start.
    on_loaded
        Called when an instance is loaded, before it serves.
    """

    def __init__(
        self,
        clock: Clock,
        devices: Sequence[Device],
        links: Links,
        delays: StartDelays,
        on_loaded: Callable[[Instance], None],
    ) -> None:
        self.clock, self.devices, self.links = clock, devices, links
        self.delays, self.on_loaded = delays, on_loaded

    def begin(self, instance: Instance) -> None:
        """Start an instance whose shards have room on its devices."""
        delay = self.delays.switch_s + self.delays.engine_start_s
        if any(
            not self.devices[index].shards[instance.model, rank].complete
            for rank, index in enumerate(instance.device_indices)
        ):
            delay += self.delays.mapping_poll_s
        self.clock.after(delay, lambda: self._load(instance))

    def _load(self, instance: Instance) -> None:
        """Move the loads of missing layers to the foreground; use resident layers from now on."""
        instance.layer_arrivals = [self.clock.now] * len(instance.profile.layer_bytes)
        flows = []
        for rank, index in enumerate(instance.device_indices):
            device = self.devices[index]
            shard = device.shards[instance.model, rank]
            if not shard.complete:
                instance.missing_on.add(index)
                flows.append(shard.flow or self.links.load(device, shard, priority=float("inf")))
        for flow in flows:
            self.links.promote(flow, partial(self._shard_loaded, instance, flow))
        if not flows:
            self._all_loaded(instance)

    def _shard_loaded(self, instance: Instance, flow: Flow) -> None:
        arrivals = arrival_times(flow, flow.shard.ends)
        instance.layer_arrivals = list(map(max, instance.layer_arrivals, arrivals))
        instance.missing_on.discard(flow.device.index)
        if not instance.missing_on:
            self._all_loaded(instance)

    def _all_loaded(self, instance: Instance) -> None:
        """Serve now, or at the next poll of a runtime that polls."""
        if self.delays.server_poll_s:
            since = self.clock.now - instance.started_at
            polls = math.ceil(since / self.delays.server_poll_s - 1e-9)
            wait = polls * self.delays.server_poll_s - since
            self.clock.after(wait, lambda: self._serve(instance))
        else:
            self._serve(instance)

    def _serve(self, instance: Instance) -> None:
        instance.loaded = True
        self.on_loaded(instance)
        instance.begin_serving()
