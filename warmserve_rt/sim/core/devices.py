"""Devices and what lies in their memory: shards of models and the KV cache of an instance."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from warmserve_rt.policy.profile import ModelProfile

if TYPE_CHECKING:
    from .instance import Instance
    from .links import Flow


KV_STEP = float(1 << 30)  # bytes by which an elastic KV cache grows on each device


@dataclass(frozen=True)
class Hardware:
    """Of a fleet: ``devices`` in nodes of ``node_devices``, each with ``memory`` bytes for layers
    and KV caches. ``bandwidth``: bytes a second from pinned host memory to one device.
    ``multipath``: over how many host links at most a foreground load may go, its own and those of
    idle neighbours. ``switch_devices``: that many devices share one link of ``bandwidth``.
    ``host_memory``: bytes of a node that keep models; what is not there comes from the node's disk
    at ``disk_bandwidth``. ``background_share``: what of a link's bytes background loads get while
    a foreground load wants it. ``interference``: while b other instances work on a device, prefills
    and steps of each take 1 + ``interference`` b times as long. Assumed: no source gives it for any
    two models, a comparison should vary it from 0 to 1.

    Raises ValueError for what cannot be."""

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
            raise ValueError(f"{self.devices} devices are no nodes of {self.node_devices}")
        if self.switch_devices < 1 or self.node_devices % self.switch_devices:
            raise ValueError(f"{self.node_devices} devices do not share {self.switch_devices} each")
        rates = (self.memory, self.bandwidth, self.disk_bandwidth)
        if not all(0 < each < float("inf") for each in rates) or self.multipath < 1:
            raise ValueError("memory, bandwidths and paths are positive and finite")
        if not self.host_memory >= 0:
            raise ValueError(f"a host memory of {self.host_memory} bytes")
        if not 0 <= self.background_share < 1:
            raise ValueError(f"a background share of {self.background_share}")
        if not 0 <= self.interference < float("inf"):
            raise ValueError(f"an interference of {self.interference}: it is not negative")


class Shard:
    """The leading layers of one rank of a model on one device.

    ``ends``: cumulative bytes of its layers. ``target``: bytes it has room for, ``resident``: those
    that had arrived when its flow last settled. ``unused``: those of them that a background load
    brought and nothing has used.
    ``stamps``: (bytes, keep value) of its leading parts; the lowest goes first, and ``planned`` are
    the bytes that are meant to stay.
    """

    __slots__ = (
        "ends",
        "flow",
        "model",
        "pinned",
        "planned",
        "rank",
        "resident",
        "stamps",
        "target",
        "unused",
    )

    def __init__(self, model: int, rank: int, ends: tuple[int, ...]) -> None:
        self.model, self.rank, self.ends = model, rank, ends
        self.target = self.resident = self.unused = 0.0
        self.planned = 0.0
        self.stamps: list[tuple[float, float]] = []
        self.pinned = False
        self.flow: Flow | None = None

    def tail(self, target: float) -> tuple[float, float]:
        """Of its leading ``target`` bytes, the keep value of the last, and where those of a higher
        one end."""
        if target > self.planned + 0.5:
            return 0.0, self.planned
        before = 0.0
        for end, keep in self.stamps:
            if end >= target - 0.5:
                return keep, before
            before = end
        return 0.0, before  # no layer beyond the last stamp saves anything

    @property
    def here(self) -> float:
        """Bytes of it that are there by now. Asking settles nothing: that would round otherwise."""
        flow = self.flow
        if flow is None or flow.rate <= 0:
            return self.resident
        return min(self.resident + flow.rate * (flow.links.events.now - flow.since), self.target)

    @property
    def goal(self) -> int:
        """How many of them have room, and are there or on their way."""
        return bisect_right(self.ends, self.target + 0.5)

    @property
    def layers(self) -> int:
        """How many of its leading layers are resident."""
        return bisect_right(self.ends, self.here + 0.5)


class Device:
    """One device. ``used``: bytes of its shards' targets and of the KV caches ``kv`` of the
    ``instances`` on it. ``foreground``: what instances wait for, one after the other."""

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
        """The first there is; the only one where a policy has no two of them share a device."""
        return self.instances[0] if self.instances else None

    @property
    def occupants(self) -> dict[tuple[int, int], bool]:
        """Of each instance its model and the first of its devices: whether it is active."""
        return {(i.model, i.devices[0].index): i.active for i in self.instances}

    @property
    def room(self) -> float:
        """Bytes for layers, beside the KV caches and the weights of active instances."""
        active = sum(i.profile.nbytes + KV_STEP for i in self.instances if i.active)
        return max(self.memory - self.kv - active, 0.0)

    @property
    def spare(self) -> float:
        """Bytes that no instance uses."""
        return self.memory - self.kv - sum(i.profile.nbytes for i in self.instances)


def layer_ends(profile: ModelProfile) -> tuple[int, ...]:
    """Cumulative bytes of a model's layers on one device."""
    return tuple(accumulate(profile.layer_bytes))
