"""Simulate host links: loads and their rates. The model is fluid: bytes flow evenly."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence

from warmserve_rt.policy.profile import ModelProfile

from .clock import Clock
from .devices import Device, Flow, Hardware, Shard
from .host import HostMemory
from .prefetch import Prefetch


class Links:
    """All flows of a fleet. A device runs one foreground flow at a time, in order of arrival.

    Parameters
    ----------
    clock
        The clock of the simulation.
    hardware
        The bandwidths and the host memory.
    devices
        The devices, node by node.
    profiles
        The profiles of the models.

    Attributes
    ----------
    loaded_bytes
        Bytes loaded by all flows.
    nodes
        The devices of each node.
    host_memories
        The host memory of each node.
    prefetches
        The background loads from disk to the host memory of each node.
    """

    def __init__(
        self,
        clock: Clock,
        hardware: Hardware,
        devices: Sequence[Device],
        profiles: Sequence[ModelProfile],
    ) -> None:
        self.clock, self.hardware = clock, hardware
        self.loaded_bytes = 0.0
        size = hardware.node_devices
        self.nodes = [list(devices[i : i + size]) for i in range(0, len(devices), size)]
        self.host_memories = [HostMemory(hardware.host_memory, profiles) for _ in self.nodes]
        self.prefetches = [
            Prefetch(clock, host, hardware.disk_bandwidth) for host in self.host_memories
        ]

    def load(self, device: Device, shard: Shard, *, priority: float) -> Flow:
        """Begin to load a shard up to its target in the background.

        Parameters
        ----------
        device, shard
            The shard, and its device.
        priority
            The priority among the background flows of the device; the highest runs first.
        """
        self.host_memories[device.node].touch(shard.model)
        flow = Flow(self.clock, device, shard, self._finish_part, priority=priority)
        shard.flow = flow
        queue = device.background
        place = len(queue)
        while place and queue[place - 1].priority < priority:
            place -= 1
        queue.insert(place, flow)
        if not place:
            self._update_rates(device.node)
        return flow

    def promote(self, flow: Flow, on_loaded: Callable[[], None]) -> None:
        """Move a background flow to the end of its device's foreground flows.

        Parameters
        ----------
        flow
            The flow.
        on_loaded
            Called when all bytes have arrived.
        """
        self.accrue(flow)
        flow.device.background.remove(flow)
        flow.foreground, flow.on_loaded = True, on_loaded
        flow.marks.append((flow.shard.resident, self.clock.now))
        flow.device.foreground.append(flow)
        self._update_rates(flow.device.node)

    def stop(self, flow: Flow) -> None:
        """Cancel a flow. Bytes that have arrived stay."""
        self.accrue(flow)
        self._remove(flow)

    def accrue(self, flow: Flow) -> None:
        """Credit the bytes of a flow that have arrived until now."""
        now = self.clock.now
        if flow.rate > 0:
            shard = flow.shard
            arrived = min(flow.rate * (now - flow.since), flow.stop - shard.resident)
            self._credit(shard, arrived)
        flow.since = now
        if flow.foreground:
            flow.marks.append((flow.shard.resident, now))

    def _credit(self, shard: Shard, arrived: float) -> None:
        """Count bytes of a shard that have arrived."""
        shard.resident += arrived
        self.loaded_bytes += arrived
        if not shard.pinned:
            shard.unused += arrived

    def _finish_part(self, flow: Flow) -> None:
        """Finish the part of a flow whose last bytes have arrived, and begin the next part."""
        self.accrue(flow)
        shard = flow.shard
        self._credit(shard, flow.stop - shard.resident)  # bytes that rounding left out
        shard.resident = flow.stop
        if flow.foreground:
            flow.marks[-1] = (flow.stop, self.clock.now)
        if flow.from_disk:
            host = self.host_memories[flow.device.node]
            host.add(shard.model, shard.rank, bisect_left(shard.ends, flow.stop))
        if flow.stop < shard.target:
            before = flow.from_disk
            self._begin_part(flow)
            self._schedule(flow)
            if flow.from_disk != before:
                self._update_rates(flow.device.node)
            return
        self._remove(flow)
        if flow.on_loaded:
            flow.on_loaded()

    def _begin_part(self, flow: Flow) -> None:
        """Find where the next bytes of a flow lie."""
        shard, host = flow.shard, self.host_memories[flow.device.node]
        if host.infinite:
            return
        layer = bisect_right(shard.ends, shard.resident + 0.5)
        flow.stop = float(shard.ends[layer])
        flow.from_disk = not host.holds(shard.model, shard.rank, layer)

    def _remove(self, flow: Flow) -> None:
        self.clock.cancel(flow)
        flow.rate = 0.0
        device, shard = flow.device, flow.shard
        shard.flow = None
        queue = device.foreground if flow.foreground else device.background
        first = queue[0] is flow
        queue.remove(flow)
        if first:  # only the first flow of a queue has a rate
            self._update_rates(device.node)

    def _update_rates(self, node: int) -> None:
        """Recompute the rates of a node's flows.

        The devices behind one switch share a link evenly. A foreground flow gets its link minus the
        background's share. With multipath it also gets an even part of the links that no foreground
        flow uses, again minus the background's share. The background loses that part even if the
        disk is too slow to use it.
        """
        hardware, devices = self.hardware, self.nodes[node]
        share, size = hardware.background_share, hardware.switch_devices
        urgent = 0
        spare = 0.0  # links without a foreground flow, minus the background's share
        switches = []
        for first in range(0, len(devices), size):
            group = devices[first : first + size]
            ahead = [d.foreground[0] for d in group if d.foreground]
            behind = [d.background[0] for d in group if d.background]
            for flow in (*ahead, *behind):
                if not flow.rate:  # it begins, or goes on after a pause
                    self._begin_part(flow)
            own = 1.0 - (share if behind else 0.0)
            urgent += len(ahead)
            if not ahead:
                spare += own
            switches.append((ahead, behind, own))
        if not any(ahead or behind for ahead, behind, _ in switches):
            self.prefetches[node].yield_to(0.0)
            return
        more = min(hardware.multipath - 1, spare / urgent) if urgent else 0.0
        taken = more * urgent / spare if spare else 0.0
        rates: list[tuple[Flow, float]] = []
        for ahead, behind, own in switches:
            for flow in ahead:
                rates.append((flow, hardware.bandwidth * (own / len(ahead) + more)))
            left = 1.0 - own * (1.0 if ahead else taken)
            for flow in behind:
                rates.append((flow, hardware.bandwidth * left / len(behind)))
        used = self._read_disk(rates)
        for device in devices:
            for flow in device.background[1:]:
                if not flow.rate:
                    break  # only the flow that was first before has a rate
                self._set_rate(flow, 0.0)
            for flow in device.foreground[1:]:
                self._set_rate(flow, 0.0)
        self.prefetches[node].yield_to(used)

    def _read_disk(self, rates: list[tuple[Flow, float]]) -> float:
        """Set the rates of a node's flows, and divide the disk among those that read it. Return the
        bytes per second that they read.

        The foreground flows get the disk minus the background's share, and the background flows get
        what the others leave.

        Parameters
        ----------
        rates
            The rate of each flow if no flow read the disk.
        """
        disk, used = self.hardware.disk_bandwidth, 0.0
        reading = [flow for flow, rate in rates if flow.from_disk and rate > 0]
        behind = sum(not flow.foreground for flow in reading)
        limits = {
            True: disk * (1 - (self.hardware.background_share if behind else 0.0)),
            False: disk,
        }
        for foreground, count in ((True, len(reading) - behind), (False, behind)):
            limit = max(limits[foreground] - used, 0.0) / (count or 1)
            for flow, rate in rates:
                if flow.foreground == foreground:
                    self._set_rate(flow, min(rate, limit) if flow.from_disk else rate)
                    used += flow.rate if flow.from_disk else 0.0
        return used

    def _set_rate(self, flow: Flow, rate: float) -> None:
        if rate == flow.rate:
            return
        self.accrue(flow)
        flow.rate = rate
        if rate > 0:
            self._schedule(flow)
        else:
            self.clock.cancel(flow)

    def _schedule(self, flow: Flow) -> None:
        """Schedule the end of a part, from which on the flow's bytes are accrued."""
        left = flow.stop - flow.shard.resident
        self.clock.schedule(flow, self.clock.now + left / flow.rate)


def arrival_times(flow: Flow, ends: Sequence[float]) -> list[float]:
    """Return the time at which each of these leading parts of a flow's shard had arrived.

    For parts that were resident when the flow moved to the foreground, the time of that move is
    returned.

    Parameters
    ----------
    flow
        A foreground flow that has finished.
    ends
        The bytes at which the parts end.
    """
    times = []
    for end in ends:
        after = bisect_left(flow.marks, (end, -math.inf))
        high, stop = flow.marks[after]
        low, begin = flow.marks[after - 1] if after else (-math.inf, stop)
        times.append(stop - (stop - begin) * (high - end) / (high - low))
    return times
