"""What a run looks like over time: the memory of its devices, the use of its links."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from warmserve_rt.sim.core.devices import Device, Shard
from warmserve_rt.sim.core.events import Timer
from warmserve_rt.sim.core.fleet import Fleet


@dataclass
class Track:
    """One shard of a model on one device; a value for each sample."""

    model: str
    rank: int
    layers_total: int
    layers: list[int]
    nbytes: list[float]
    serving: list[bool]


@dataclass
class DeviceTimeline:
    """``kv``: bytes of the KV cache at each sample. ``tracks`` in the order in which they came."""

    kv: list[float] = field(default_factory=list)
    tracks: dict[tuple[int, int], Track] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)


class Timeline:
    """Samples a fleet every ``step`` seconds until ``end``; it changes nothing in it.

    ``link_use``: bytes loaded in the step before each sample, over what all links could have
    carried, the first 0.
    """

    def __init__(self, end: float, samples: int = 240) -> None:
        self.end, self.step = end, end / samples
        self.times: list[float] = []
        self.link_use: list[float] = []

    def __call__(self, fleet: Fleet) -> None:
        """Begins, at the fleet's time 0."""
        self.fleet = fleet
        self.devices = [DeviceTimeline() for _ in fleet.devices]
        self.loaded = 0.0
        self.timer = Timer(self.sample)
        fleet.events.schedule(self.timer, 0.0)

    def sample(self) -> None:
        fleet, number = self.fleet, len(self.times)
        loaded = fleet.links.loaded
        for device, timeline in zip(fleet.devices, self.devices, strict=True):
            for flow in (*device.foreground, *device.background):
                loaded += arrived(fleet, flow.shard) - flow.shard.resident
            timeline.kv.append(device.kv)
            self.sample_shards(device, timeline, number)
        hardware = fleet.hardware
        could = hardware.bandwidth * hardware.devices * self.step
        self.link_use.append((loaded - self.loaded) / could if number else 0.0)
        self.loaded = loaded
        self.times.append(fleet.events.now)
        if (number + 1.5) * self.step < self.end:
            fleet.events.schedule(self.timer, fleet.events.now + self.step)

    def sample_shards(self, device: Device, timeline: DeviceTimeline, number: int) -> None:
        fleet = self.fleet
        for (model, rank), shard in device.shards.items():
            track = timeline.tracks.get((model, rank))
            if track is None:
                profile = fleet.profiles[model]
                track = timeline.tracks[model, rank] = Track(
                    profile.name, rank, len(shard.ends), [], [], []
                )
            missing = number - len(track.layers)
            there = arrived(fleet, shard)
            track.layers += [0] * missing + [bisect_right(shard.ends, there + 0.5)]
            track.nbytes += [0.0] * missing + [there]
            track.serving += [False] * missing + [shard.pinned]
            if shard.pinned:
                timeline.started.add(model)

    def busiest(self) -> tuple[int, DeviceTimeline]:
        """The device on which the most models served, the first of several, padded to the end."""
        index = max(range(len(self.devices)), key=lambda i: (len(self.devices[i].started), -i))
        timeline = self.devices[index]
        for track in timeline.tracks.values():
            missing = len(self.times) - len(track.layers)
            track.layers += [0] * missing
            track.nbytes += [0.0] * missing
            track.serving += [False] * missing
        return index, timeline


def arrived(fleet: Fleet, shard: Shard) -> float:
    """Bytes of it that are there now. To ask the flow to settle would round its bytes otherwise
    than in a run that nobody watches."""
    flow = shard.flow
    if flow is None or flow.rate <= 0:
        return shard.resident
    return min(shard.resident + flow.rate * (fleet.events.now - flow.since), shard.target)
