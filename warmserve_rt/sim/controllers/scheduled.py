"""Show a simulated fleet to a scheduler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from warmserve_rt.policy._arrays import F64
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.protocols import KeepValues
from warmserve_rt.sim.core.devices import Device, Shard
from warmserve_rt.sim.core.fleet import Fleet


class ScheduledDevice:
    """Implement :class:`warmserve_rt.scheduling.protocols.Device` for one simulated device."""

    __slots__ = ("device", "fleet", "index")

    def __init__(self, fleet: Fleet, device: Device) -> None:
        self.fleet, self.device, self.index = fleet, device, device.index

    @property
    def shards(self) -> Mapping[tuple[int, int], Shard]:
        return self.device.shards

    @property
    def occupants(self) -> Mapping[tuple[int, int], bool]:
        return self.device.occupants

    @property
    def room(self) -> float:
        return self.device.room

    def set_keep_values(self, model: int, rank: int, layers: int, values: KeepValues) -> None:
        self.fleet.memory.set_keep_values(
            self.device, self.device.shards[model, rank], layers, values
        )

    def load(self, model: int, rank: int, layers: int, values: KeepValues) -> bool:
        return self.fleet.memory.load(self.device, model, rank, layers, values)

    def cancel(self, model: int, rank: int, layers: int) -> None:
        self.fleet.memory.cancel(self.device, self.device.shards[model, rank], layers)


class ScheduledHost:
    """Implement :class:`warmserve_rt.scheduling.protocols.HostTier` for the host memory of one
    node."""

    __slots__ = ("devices", "file_bandwidth", "memory", "nbytes", "prefetch")

    def __init__(self, fleet: Fleet, node: int) -> None:
        self.devices: Sequence[int] = [device.index for device in fleet.links.nodes[node]]
        self.memory, self.prefetch = fleet.links.host_memories[node], fleet.links.prefetches[node]
        self.nbytes, self.file_bandwidth = self.memory.capacity, fleet.hardware.disk_bandwidth

    def holds(self, model: int) -> Sequence[bool]:
        return self.memory.held(model)

    def hold(self, plan: Mapping[int, F64]) -> None:
        self.prefetch.want(self.memory.value(plan))


class ScheduledFleet:
    """Implement :class:`warmserve_rt.scheduling.protocols.Fleet` for a simulated fleet."""

    def __init__(self, simulated: Fleet) -> None:
        self.simulated = simulated
        self.profiles: Sequence[ModelProfile] = simulated.profiles
        self.bandwidth, self.switch_s = simulated.bandwidth, simulated.switch_s
        self.node_devices = simulated.node_devices
        self.devices = [ScheduledDevice(simulated, device) for device in simulated.devices]
        # Infinite host memory holds every layer, so that there is no tier to plan.
        finite = simulated.hardware.host_memory < float("inf")
        nodes = range(len(simulated.links.nodes)) if finite else ()
        self.hosts = [ScheduledHost(simulated, node) for node in nodes]

    @property
    def now(self) -> float:
        return self.simulated.now

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.simulated.after(seconds, call)
