"""Simulate host links: loads and their rates. The model is fluid: bytes flow evenly."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence

from .clock import Clock
from .devices import Device, Flow, Hardware, Shard
from .host import HostMemory


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

    Attributes
    ----------
    loaded_bytes
        Bytes loaded by all flows.
    nodes
        The devices of each node.
    host_memories
        The host memory of each node.
    """

    def __init__(self, clock: Clock, hardware: Hardware, devices: Sequence[Device]) -> None:
        self.clock, self.hardware = clock, hardware
        self.loaded_bytes = 0.0
        size = hardware.node_devices
        self.nodes = [list(devices[i : i + size]) for i in range(0, len(devices), size)]
        self.host_memories = [HostMemory(hardware.host_memory) for _ in self.nodes]

    def load(self, device: Device, shard: Shard, *, priority: float) -> Flow:
        """Begin to load a shard up to its target in the background.

        Parameters
        ----------
        device, shard
            The shard, and its device.
        priority
            The priority among the background flows of the device; the highest runs first.
        """
        host = self.host_memories[device.node]
        host.touch(shard.model)
        from_disk = not host.has(shard.model, shard.rank, shard.target)
        flow = Flow(self.clock, device, shard, self._finish, priority=priority, from_disk=from_disk)
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
            arrived = min(flow.rate * (now - flow.since), shard.target - shard.resident)
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

    def _finish(self, flow: Flow) -> None:
        """Finish a flow whose last bytes have arrived."""
        self.accrue(flow)
        shard = flow.shard
        self._credit(shard, shard.target - shard.resident)  # bytes that rounding left out
        shard.resident = shard.target
        if flow.foreground:
            flow.marks[-1] = (shard.target, self.clock.now)
        self._remove(flow)
        if flow.on_loaded:
            flow.on_loaded()

    def _remove(self, flow: Flow) -> None:
        self.clock.cancel(flow)
        flow.rate = 0.0
        device, shard = flow.device, flow.shard
        shard.flow = None
        if flow.from_disk:
            self.host_memories[device.node].add(shard.model, shard.rank, shard.resident)
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
            own = 1.0 - (share if behind else 0.0)
            urgent += len(ahead)
            if not ahead:
                spare += own
            switches.append((ahead, behind, own))
        if not any(ahead or behind for ahead, behind, _ in switches):
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
        on_disk = sum(flow.from_disk for flow, rate in rates if rate > 0) or 1
        limit = hardware.disk_bandwidth / on_disk
        for flow, rate in rates:
            self._set_rate(flow, min(rate, limit) if flow.from_disk else rate)
        for device in devices:
            for flow in device.background[1:]:
                if not flow.rate:
                    break  # only the flow that was first before has a rate
                self._set_rate(flow, 0.0)
            for flow in device.foreground[1:]:
                self._set_rate(flow, 0.0)

    def _set_rate(self, flow: Flow, rate: float) -> None:
        if rate == flow.rate:
            return
        self.accrue(flow)
        flow.rate = rate
        if rate > 0:
            left = flow.shard.target - flow.shard.resident
            self.clock.schedule(flow, self.clock.now + left / rate)
        else:
            self.clock.cancel(flow)


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
