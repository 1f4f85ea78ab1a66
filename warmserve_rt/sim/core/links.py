"""Simulate host links: loads and their rates. The model is fluid: bytes flow evenly."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING

from .devices import Device, Hardware, Shard
from .events import Due, Events
from .host import HostMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class Flow(Due):
    """The load of a shard's missing bytes over its device's link.

    ``priority``: a device runs one background flow at a time, the one with the highest priority.
    ``disk``: host memory lacks some of the bytes, so that the whole flow runs at the speed of the
    disk. ``done``: called when all bytes have arrived.
    """

    __slots__ = (
        "device",
        "disk",
        "done",
        "foreground",
        "links",
        "marks",
        "priority",
        "rate",
        "shard",
        "since",
    )

    def __init__(
        self, links: Links, device: Device, shard: Shard, priority: float, disk: bool
    ) -> None:
        super().__init__()
        self.links, self.device, self.shard = links, device, shard
        self.priority, self.disk = priority, disk
        self.foreground = False
        self.rate = 0.0
        self.since = links.events.now
        self.done: Callable[[], None] | None = None
        self.marks: list[tuple[float, float]] = []  # (bytes resident, time) while in the foreground

    def settle(self, now: float) -> None:
        """Account for the bytes that have arrived until now."""
        if self.rate > 0:
            self.book(min(self.rate * (now - self.since), self.shard.target - self.shard.resident))
        self.since = now
        if self.foreground:
            self.marks.append((self.shard.resident, now))

    def book(self, arrived: float) -> None:
        """Count bytes that have arrived."""
        shard = self.shard
        shard.resident += arrived
        self.links.loaded += arrived
        if not shard.pinned:
            shard.unused += arrived

    def arrivals(self, ends: Sequence[float]) -> list[float]:
        """Return the time at which each of these leading parts of the shard had arrived.

        Call it when the flow is done. For parts that were resident when the flow moved to the
        foreground, the time of that move is returned.
        """
        times = []
        for end in ends:
            after = bisect_left(self.marks, (end, -math.inf))
            high, stop = self.marks[after]
            low, begin = self.marks[after - 1] if after else (-math.inf, stop)
            times.append(stop - (stop - begin) * (high - end) / (high - low))
        return times

    def happen(self) -> None:
        self.links.arrived(self)


class Links:
    """All flows of a fleet. A device runs one foreground flow at a time, in order of arrival."""

    def __init__(self, events: Events, hardware: Hardware, devices: list[Device]) -> None:
        self.events, self.hardware = events, hardware
        self.loaded = 0.0  # bytes loaded by all flows
        size = hardware.node_devices
        self.nodes = [devices[i : i + size] for i in range(0, len(devices), size)]
        self.hosted = [HostMemory(hardware.host_memory) for _ in self.nodes]

    def load(self, device: Device, shard: Shard, *, priority: float) -> Flow:
        """Begin to load a shard up to its target in the background."""
        hosted = self.hosted[device.node]
        hosted.use(shard.model)
        disk = not hosted.has(shard.model, shard.rank, shard.target)
        flow = Flow(self, device, shard, priority, disk)
        shard.flow = flow
        queue = device.background
        place = len(queue)
        while place and queue[place - 1].priority < priority:
            place -= 1
        queue.insert(place, flow)
        if not place:
            self.balance(device.node)
        return flow

    def urge(self, flow: Flow, done: Callable[[], None]) -> None:
        """Move a background flow to the end of its device's foreground flows."""
        flow.settle(self.events.now)
        flow.device.background.remove(flow)
        flow.foreground, flow.done = True, done
        flow.marks.append((flow.shard.resident, self.events.now))
        flow.device.foreground.append(flow)
        self.balance(flow.device.node)

    def stop(self, flow: Flow) -> None:
        """Cancel a flow. Bytes that have arrived stay."""
        flow.settle(self.events.now)
        self._leave(flow)

    def arrived(self, flow: Flow) -> None:
        """Finish a flow whose last bytes have arrived."""
        flow.settle(self.events.now)
        flow.book(flow.shard.target - flow.shard.resident)  # bytes that rounding left out
        flow.shard.resident = flow.shard.target
        if flow.foreground:
            flow.marks[-1] = (flow.shard.target, self.events.now)
        self._leave(flow)
        if flow.done:
            flow.done()

    def _leave(self, flow: Flow) -> None:
        self.events.cancel(flow)
        flow.rate = 0.0
        device, shard = flow.device, flow.shard
        shard.flow = None
        if flow.disk:
            self.hosted[device.node].bring(shard.model, shard.rank, shard.resident)
        queue = device.foreground if flow.foreground else device.background
        first = queue[0] is flow
        queue.remove(flow)
        if first:  # only the first flow of a queue has a rate
            self.balance(device.node)

    def balance(self, node: int) -> None:
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
        on_disk = sum(flow.disk for flow, rate in rates if rate > 0) or 1
        for flow, rate in rates:
            self._set(flow, min(rate, hardware.disk_bandwidth / on_disk) if flow.disk else rate)
        for device in devices:
            for flow in device.background[1:]:
                if not flow.rate:
                    break  # only the flow that was first before has a rate
                self._set(flow, 0.0)
            for flow in device.foreground[1:]:
                self._set(flow, 0.0)

    def _set(self, flow: Flow, rate: float) -> None:
        if rate == flow.rate:
            return
        now = self.events.now
        flow.settle(now)
        flow.rate = rate
        if rate > 0:
            left = flow.shard.target - flow.shard.resident
            self.events.schedule(flow, now + left / rate)
        else:
            self.events.cancel(flow)
