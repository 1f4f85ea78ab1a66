"""The memory of a fleet's devices: what has room in it, what loads into it, what must leave it."""

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
    """Shards come, grow and go by whole layers; ``device.used`` counts what they have room for."""

    def __init__(self, profiles: Sequence[ModelProfile], hardware: Hardware) -> None:
        self.profiles, self.hardware = profiles, hardware
        self.ends = [layer_ends(profile) for profile in profiles]
        self.events = Events()
        memory = float(math.floor(hardware.memory))  # whole bytes: sums of them are exact
        self.devices = [
            Device(i, i // hardware.node_devices, memory) for i in range(hardware.devices)
        ]
        self.links = Links(self.events, hardware, self.devices)
        self.hosted = self.links.hosted  # of each node
        self.wasted = 0.0  # bytes that came in the background and went unused

    # What a controller does.

    def preload(self, device: Device, model: int, rank: int) -> None:
        """All of a shard is there, out of nothing. Raises ValueError where there is no room."""
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
        """Begins to load its leading layers in the room there is; False where there is none.

        Raises ValueError for layers that there are not.
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
        """As prewarm, in room that is made of what is worth less; where that is not enough,
        nothing is evicted."""
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
        """So many leading layers are to stay, with these keep values; the others have none."""
        shard.stamps, shard.planned = stamps, self._bound(shard.model, layers)

    def call_off(self, device: Device, shard: Shard, layers: int) -> None:
        """Loads no more than its leading layers; those that are there stay."""
        self.keep(device, shard, max(layers, shard.layers))

    def keep(self, device: Device, shard: Shard, layers: int) -> None:
        """Drops all but its leading layers, and calls off what loads the others.

        Raises ValueError for a shard that an instance uses, and for layers that there are not.
        """
        bound = self._bound(shard.model, layers)
        if bound >= shard.target:
            return
        if shard.pinned:
            raise ValueError(f"an instance uses {self.profiles[shard.model].name} here")
        flow = shard.flow
        if flow:
            self.links.stop(flow)
        lost = max(0.0, shard.resident - bound)
        unused = min(lost, shard.unused)  # what came last
        self.wasted += unused
        shard.unused -= unused
        shard.resident = min(shard.resident, bound)
        self._resize(device, shard, bound)
        if not layers:
            del device.shards[shard.model, shard.rank]
        elif flow and shard.resident < bound:
            self.links.load(device, shard, priority=flow.priority)

    def fits(self, device: Device, model: int) -> bool:
        """Whether an instance of it could start here beside those that are active, and have some
        KV cache."""
        if any(each.model == model for each in device.instances):
            return False
        need = float(self.profiles[model].nbytes)
        if any(each.active for each in device.instances):
            need += KV_STEP
        return need <= device.room

    # The books.

    def _bound(self, model: int, layers: int) -> float:
        """Where these leading layers end."""
        ends = self.ends[model]
        if not 0 <= layers <= len(ends):
            raise ValueError(f"{layers} layers of {self.profiles[model].name}'s {len(ends)}")
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
        """Evicts tail layers, those of the lowest keep value first and only what is worth less than
        ``below``; where that is not enough nothing, and it is False."""
        lacking = device.used + more - device.memory
        bounds = {s: s.target for s in device.shards.values() if not s.pinned and s is not spare}
        layers: dict[Shard, int] = {}
        while lacking > 0:
            tails = [(*shard.tail(bound), shard) for shard, bound in bounds.items() if bound > 0]
            keep, floor, shard = min(tails, key=lambda tail: tail[0], default=(below, 0.0, None))
            if shard is None or keep >= below:
                return False
            # At least a byte, so that what rounding lacks is a layer too.
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
        """On each of its devices. A whole number, so that sums of them are exact."""
        for device in instance.devices:
            device.used += nbytes - instance.kv_room
            device.kv += nbytes - instance.kv_room
        instance.kv_room = nbytes

    def _grow_kv(self, instance: Instance, need: float) -> bool:
        """On each of its devices, to so many bytes; where one has no room for it on none."""
        more = need - instance.kv_room
        if any(device.spare < more for device in instance.devices):
            return False
        for device in instance.devices:
            self._make_room(device, more)
        self._set_kv(instance, need)
        return True
