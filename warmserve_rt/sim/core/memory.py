"""Manage the memory of a fleet's devices: reserve room, load layers, evict layers."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from warmserve_rt.policy.profile import ModelProfile

from .devices import KV_STEP, Device, Hardware, Shard, layer_ends
from .events import Events
from .links import Links

if TYPE_CHECKING:
    from .instance import Instance


class Memory:
    """The memory of all devices. Shards grow and shrink by whole layers, and ``device.used`` counts
    their targets."""

    def __init__(self, profiles: Sequence[ModelProfile], hardware: Hardware) -> None:
        self.profiles, self.hardware = profiles, hardware
        self.ends = [layer_ends(profile) for profile in profiles]
        self.events = Events()
        memory = float(math.floor(hardware.memory))  # whole bytes, so that sums are exact
        self.devices = [
            Device(i, i // hardware.node_devices, memory) for i in range(hardware.devices)
        ]
        self.links = Links(self.events, hardware, self.devices)
        self.hosted = self.links.hosted  # host memory of each node
        self.wasted = 0.0  # bytes that background loads brought and no instance used

    # Called by a controller.

    def preload(self, device: Device, model: int, rank: int) -> None:
        """Make a whole shard resident without a load. Raise ValueError if it does not fit."""
        shard, end = device.shards.get((model, rank)), self.ends[model][-1]
        if device.used + end - (shard.target if shard else 0.0) > device.memory:
            raise ValueError(f"device {device.index} has no room for {self.profiles[model].name}")
        shard = shard or self._shard(device, model, rank)
        if shard.flow:
            self.links.stop(shard.flow)
        self._resize(device, shard, end)
        shard.resident = shard.target

    def prewarm(
        self, device: Device, model: int, rank: int, layers: int, *, priority: float = 0.0
    ) -> bool:
        """Begin to load leading layers of a shard into free memory.

        Parameters
        ----------
        device
            The device to load to.
        model, rank
            The model and the rank of the shard.
        layers
            The number of leading layers.
        priority
            The priority among the device's background loads; the highest runs first.

        Returns
        -------
        bool
            False if the free memory is too small; nothing is changed then.

        Raises
        ------
        ValueError
            If the model has fewer layers.
        """
        target = self._bound(model, layers)
        shard = device.shards.get((model, rank))
        more = target - (shard.target if shard else 0.0)
        if more <= 0:
            return True
        if device.used + more > device.memory:
            return False
        shard = shard or self._shard(device, model, rank)
        if shard.flow:
            self.links.stop(shard.flow)
        self._resize(device, shard, target)
        self.links.load(device, shard, priority=priority)
        return True

    def load(
        self, device: Device, model: int, rank: int, layers: int, stamps: list[tuple[float, float]]
    ) -> bool:
        """Do as :meth:`prewarm`, and evict layers with lower keep values if room is short. Return
        False and evict no layer if that makes too little room."""
        target = self._bound(model, layers)
        shard = device.shards.get((model, rank))
        value = next((keep for end, keep in stamps if end >= target), 0.0)
        more = target - (shard.target if shard else 0.0)
        if not self._make_room(device, more, spare=shard, below=value):
            return False
        if not self.prewarm(device, model, rank, layers, priority=value):
            return False
        shard = self._shard(device, model, rank)
        shard.stamps, shard.planned = stamps, target
        return True

    def stamp(
        self, device: Device, shard: Shard, layers: int, stamps: list[tuple[float, float]]
    ) -> None:
        """Give these leading layers their keep values, and let the others be evicted first."""
        shard.stamps, shard.planned = stamps, self._bound(shard.model, layers)

    def call_off(self, device: Device, shard: Shard, layers: int) -> None:
        """Cancel loads beyond these leading layers. Resident layers stay."""
        self.keep(device, shard, max(layers, shard.layers))

    def keep(self, device: Device, shard: Shard, layers: int) -> None:
        """Drop all but these leading layers, and cancel the loads of the others.

        Raises
        ------
        ValueError
            If layers would be dropped that an instance uses, or if the model has fewer layers.
        """
        bound = self._bound(shard.model, layers)
        if bound >= shard.target:
            return
        if shard.pinned:
            raise ValueError(
                f"cannot drop layers that an instance uses: {self.profiles[shard.model].name}"
            )
        flow = shard.flow
        if flow:
            self.links.stop(flow)
        lost = max(0.0, shard.resident - bound)
        unused = min(lost, shard.unused)  # the bytes that arrived last
        self.wasted += unused
        shard.unused -= unused
        shard.resident = min(shard.resident, bound)
        self._resize(device, shard, bound)
        if not layers:
            del device.shards[shard.model, shard.rank]
        elif flow and shard.resident < bound:
            self.links.load(device, shard, priority=flow.priority)

    def fits(self, device: Device, model: int) -> bool:
        """Return whether an instance of the model could start on the device beside the active ones
        and have some KV cache."""
        if any(each.model == model for each in device.instances):
            return False
        need = float(self.profiles[model].nbytes)
        if any(each.active for each in device.instances):
            need += KV_STEP
        return need <= device.room

    # Accounting.

    def _bound(self, model: int, layers: int) -> float:
        """Return the byte at which these leading layers end."""
        ends = self.ends[model]
        if not 0 <= layers <= len(ends):
            raise ValueError(
                f"layers of {self.profiles[model].name} must be in [0, {len(ends)}], got {layers}"
            )
        return float(ends[layers - 1]) if layers else 0.0

    def _shard(self, device: Device, model: int, rank: int) -> Shard:
        shard = device.shards.get((model, rank))
        if shard is None:
            shard = device.shards[model, rank] = Shard(model, rank, self.ends[model])
        return shard

    def _resize(self, device: Device, shard: Shard, target: float) -> None:
        device.used += target - shard.target
        shard.target = target

    def _make_room(
        self,
        device: Device,
        more: float,
        *,
        spare: Shard | None = None,
        below: float = float("inf"),
    ) -> bool:
        """Evict tail layers with keep values less than ``below`` until ``more`` bytes are free, the
        lowest values first. Return False and evict no layer if that is not enough."""
        lacking = device.used + more - device.memory
        bounds = {s: s.target for s in device.shards.values() if not s.pinned and s is not spare}
        layers: dict[Shard, int] = {}
        while lacking > 0:
            tails = [(*shard.tail(bound), shard) for shard, bound in bounds.items() if bound > 0]
            keep, floor, shard = min(tails, key=lambda tail: tail[0], default=(below, 0.0, None))
            if shard is None or keep >= below:
                return False
            # Free at least one byte, so that a shortage by rounding evicts a layer too.
            stay = max(floor + 0.5, bounds[shard] - max(lacking, 1.0))
            layers[shard] = bisect_right(shard.ends, stay)
            bound = self._bound(shard.model, layers[shard])
            lacking -= bounds[shard] - bound
            bounds[shard] = bound
        for shard, count in layers.items():
            self.keep(device, shard, count)
            shard.planned = min(shard.planned, shard.target)
        return True

    def _set_kv(self, instance: Instance, nbytes: float) -> None:
        """Set the KV cache on each device of an instance to whole bytes, so that sums are exact."""
        for device in instance.devices:
            device.used += nbytes - instance.kv_room
            device.kv += nbytes - instance.kv_room
        instance.kv_room = nbytes

    def _grow_kv(self, instance: Instance, need: float) -> bool:
        """Grow the KV cache to ``need`` bytes on every device, or on none if any lacks room."""
        more = need - instance.kv_room
        if any(device.spare < more for device in instance.devices):
            return False
        for device in instance.devices:
            self._make_room(device, more)
        self._set_kv(instance, need)
        return True
