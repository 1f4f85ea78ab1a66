"""Record a run over time: the memory of its devices and the use of its links."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

from warmserve_rt.sim.core.clock import Timer
from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.fleet import Fleet


@dataclass
class Track:
    """One shard of a model on one device, with a value for each sample."""

    model: str
    rank: int
    layers_total: int
    layers: list[int]
    nbytes: list[float]
    serving: list[bool]


@dataclass
class DeviceTimeline:
    """One device over time. ``kv``: bytes of its KV caches at each sample. ``tracks``: its shards,
    in the order of their first sample. ``started``: models that were in use on it."""

    kv: list[float] = field(default_factory=list)
    tracks: dict[tuple[int, int], Track] = field(default_factory=dict)
    started: set[int] = field(default_factory=set)


class Timeline:
    """An observer that samples a fleet at equal steps until ``end``, and does not change it.

    ``link_use``: bytes loaded in the step before each sample, over the bytes that all links could
    have carried. The first value is 0.
    """

    def __init__(self, end: float, samples: int = 240) -> None:
        self.end, self.step = end, end / samples
        self.times: list[float] = []
        self.link_use: list[float] = []

    def __call__(self, fleet: Fleet) -> None:
        """Begin to sample a fleet at its time 0."""
        self.fleet = fleet
        self.devices = [DeviceTimeline() for _ in fleet.devices]
        self.loaded = 0.0
        self.timer = Timer(self.sample)
        fleet.clock.schedule(self.timer, 0.0)

    def sample(self) -> None:
        fleet, number = self.fleet, len(self.times)
        loaded = fleet.links.loaded_bytes
        for device, timeline in zip(fleet.devices, self.devices, strict=True):
            for flow in (*device.foreground, *device.background):
                loaded += flow.shard.resident_now - flow.shard.resident
            timeline.kv.append(device.kv)
            self.sample_shards(device, timeline, number)
        hardware = fleet.hardware
        could = hardware.bandwidth * hardware.devices * self.step
        self.link_use.append((loaded - self.loaded) / could if number else 0.0)
        self.loaded = loaded
        self.times.append(fleet.clock.now)
        if (number + 1.5) * self.step < self.end:
            fleet.clock.schedule(self.timer, fleet.clock.now + self.step)

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
            resident = shard.resident_now
            track.layers += [0] * missing + [bisect_right(shard.ends, resident + 0.5)]
            track.nbytes += [0.0] * missing + [resident]
            track.serving += [False] * missing + [shard.pinned]
            if shard.pinned:
                timeline.started.add(model)

    def busiest(self) -> tuple[int, DeviceTimeline]:
        """Return the device that served most models (the first of equals), padded to the end."""
        index = max(range(len(self.devices)), key=lambda i: (len(self.devices[i].started), -i))
        timeline = self.devices[index]
        for track in timeline.tracks.values():
            missing = len(self.times) - len(track.layers)
            track.layers += [0] * missing
            track.nbytes += [0.0] * missing
            track.serving += [False] * missing
        return index, timeline
