"""Devices, the shards in their memory, and the loads that bring the shards' bytes."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

from warmserve_rt.policy.profile import ModelProfile

from .clock import Clock, Event
from .instance import Instance

KV_STEP = float(1 << 30)  # bytes by which an elastic KV cache grows on each device


@dataclass(frozen=True)
class Hardware:
    """The hardware of a simulated fleet.

    Parameters
    ----------
    devices
        The number of devices.
    node_devices
        The number of devices of a node.
    memory
        Bytes of each device for layers and KV caches.
    bandwidth
        Bytes per second from pinned host memory to one device.
    multipath
        The largest number of host links that one foreground load may use: its own, and those of
        idle neighbours.
    switch_devices
        The number of devices that share one link of ``bandwidth``.
    host_memory
        Bytes of each node that keep layers. Other layers are read from the node's disk.
    disk_bandwidth
        Bytes per second from the disk of a node.
    background_share
        The share of a link that background loads get while a foreground load uses it.
    interference
        While b other instances work on a device, prefills and steps of each take
        1 + ``interference`` b times as long. This value is an assumption: no source gives it for
        arbitrary pairs of models. A comparison should vary it from 0 to 1.

    Raises
    ------
    ValueError
        If a value is out of range, or the devices do not form whole nodes and switches.
    """

    devices: int = 16
    node_devices: int = 8
    memory: float = 72e9
    bandwidth: float = 25e9
    multipath: int = 1
    switch_devices: int = 1
    host_memory: float = float("inf")
    disk_bandwidth: float = 12e9
    background_share: float = 0.05
    interference: float = 0.35

    def __post_init__(self) -> None:
        if min(self.devices, self.node_devices) < 1 or self.devices % self.node_devices:
            raise ValueError(
                "devices must form whole nodes, "
                f"got {self.devices} devices in nodes of {self.node_devices}"
            )
        if self.switch_devices < 1 or self.node_devices % self.switch_devices:
            raise ValueError(
                f"switch_devices must divide node_devices = {self.node_devices}, "
                f"got {self.switch_devices}"
            )
        rates = (self.memory, self.bandwidth, self.disk_bandwidth)
        if not all(0 < each < float("inf") for each in rates) or self.multipath < 1:
            raise ValueError("memory, bandwidths and multipath must be positive and finite")
        if not self.host_memory >= 0:
            raise ValueError(f"host_memory must not be negative, got {self.host_memory} bytes")
        if not 0 <= self.background_share < 1:
            raise ValueError(f"background_share must be in [0, 1), got {self.background_share}")
        if not 0 <= self.interference < float("inf"):
            raise ValueError(
                f"interference must be finite and not negative, got {self.interference}"
            )


class Shard:
    """The leading layers of one rank of a model on one device.

    ``ends``: cumulative bytes of its layers. ``target``: bytes of the room that it has.
    ``resident``: bytes that had arrived when its flow was last accrued. ``unused``: resident bytes
    that a background load brought and no instance has used. ``keep_values``: for each leading part
    of the shard the byte at which it ends and its keep value; the lowest value is evicted first.
    ``planned``: bytes that should stay. ``pinned``: whether an instance uses the shard.
    """

    __slots__ = (
        "ends",
        "flow",
        "keep_values",
        "model",
        "pinned",
        "planned",
        "rank",
        "resident",
        "target",
        "unused",
    )

    def __init__(self, model: int, rank: int, ends: tuple[int, ...]) -> None:
        self.model, self.rank, self.ends = model, rank, ends
        self.target = self.resident = self.unused = 0.0
        self.planned = 0.0
        self.keep_values: list[tuple[float, float]] = []
        self.pinned = False
        self.flow: Flow | None = None

    def tail(self, target: float) -> tuple[float, float]:
        """Return the keep value of the last of its leading ``target`` bytes, and the byte at which
        the part with a higher value ends."""
        if target > self.planned + 0.5:
            return 0.0, self.planned
        before = 0.0
        for end, keep in self.keep_values:
            if end >= target - 0.5:
                return keep, before
            before = end
        return 0.0, before  # layers beyond the last value save no time

    @property
    def resident_now(self) -> float:
        """Return the bytes that have arrived by now.

        Does not accrue the flow, because accruing at other times would round differently.
        """
        flow = self.flow
        if flow is None or flow.rate <= 0:
            return self.resident
        return min(self.resident + flow.rate * (flow.clock.now - flow.since), flow.stop)

    @property
    def complete(self) -> bool:
        """Return whether all layers were resident when the flow was last accrued."""
        return self.resident >= self.ends[-1]

    @property
    def goal(self) -> int:
        """Return the number of leading layers that are resident or being loaded."""
        return bisect_right(self.ends, self.target + 0.5)

    @property
    def layers(self) -> int:
        """Return the number of leading layers that are resident."""
        return bisect_right(self.ends, self.resident_now + 0.5)


class Flow(Event):
    """The load of a shard's missing bytes over its device's link; see Links.

    ``priority``: a device runs one background flow at a time, the one with the highest priority.
    The flow loads one part after the other: a layer, or all missing bytes if host memory holds
    every layer. ``stop``: the byte at which the present part ends. ``from_disk``: whether the part
    is read from disk, because host memory does not hold it. ``finish``: called when the last byte
    of a part arrives. ``on_loaded``: called with the flow finished. ``marks``: (bytes resident,
    time) while the flow is in the foreground.
    """

    __slots__ = (
        "clock",
        "device",
        "finish",
        "foreground",
        "from_disk",
        "marks",
        "on_loaded",
        "priority",
        "rate",
        "shard",
        "since",
        "stop",
    )

    def __init__(
        self,
        clock: Clock,
        device: Device,
        shard: Shard,
        finish: Callable[[Flow], None],
        *,
        priority: float,
    ) -> None:
        super().__init__()
        self.clock, self.device, self.shard, self.finish = clock, device, shard, finish
        self.priority, self.from_disk = priority, False
        self.stop = shard.target
        self.foreground = False
        self.rate = 0.0
        self.since = clock.now
        self.on_loaded: Callable[[], None] | None = None
        self.marks: list[tuple[float, float]] = []

    def fire(self) -> None:
        self.finish(self)


class Device:
    """One device.

    ``used``: bytes of its shards' targets and of its KV caches. ``kv``: bytes of the KV caches of
    its ``instances``. ``foreground``: the flows that instances wait for, in the order in which they
    run. ``background``: the other flows, by priority.
    """

    __slots__ = (
        "background",
        "foreground",
        "index",
        "instances",
        "kv",
        "memory",
        "node",
        "shards",
        "used",
    )

    def __init__(self, index: int, node: int, memory: float) -> None:
        self.index, self.node, self.memory = index, node, memory
        self.shards: dict[tuple[int, int], Shard] = {}
        self.used = self.kv = 0.0
        self.instances: list[Instance] = []
        self.foreground: list[Flow] = []
        self.background: list[Flow] = []

    @property
    def instance(self) -> Instance | None:
        """Return the first instance, or None. It is the only one unless a policy shares devices."""
        return self.instances[0] if self.instances else None

    @property
    def occupants(self) -> dict[tuple[int, int], bool]:
        """Return for each instance, by its model and its first device, whether it is active."""
        return {(i.model, i.device_indices[0]): i.active for i in self.instances}

    @property
    def room(self) -> float:
        """Return the bytes for layers, without KV caches and weights of active instances."""
        active = sum(i.profile.nbytes + KV_STEP for i in self.instances if i.active)
        return max(self.memory - self.kv - active, 0.0)

    @property
    def spare(self) -> float:
        """Return the bytes that no instance uses."""
        return self.memory - self.kv - sum(i.profile.nbytes for i in self.instances)


def make_devices(hardware: Hardware) -> list[Device]:
    """Return the devices of a fleet. Their memory is whole bytes, so that sums are exact."""
    memory = float(math.floor(hardware.memory))
    return [Device(i, i // hardware.node_devices, memory) for i in range(hardware.devices)]


def layer_ends(profile: ModelProfile) -> tuple[int, ...]:
    """Return the cumulative bytes of a model's layers on one device."""
    return tuple(accumulate(profile.layer_bytes))
