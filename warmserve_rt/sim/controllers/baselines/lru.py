"""Whole-model LRU: a device keeps models that it has served until another needs the room."""

from __future__ import annotations

import math
from dataclasses import dataclass

from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance

from .autoscaler import Autoscaler

KV_TOKENS = 1024  # tokens of a request in the KV cache of a full batch, for which a start evicts


@dataclass(eq=False)
class ResidentModel:
    """A model that was served on these devices and is still resident on them."""

    model: int
    devices: tuple[Device, ...]
    last_used: float  # the time at which it was served last


class Lru(Autoscaler):
    """A controller without forecast and streaming: only models of stopped instances can be warm.

    A start evicts whole models, the least recently used first, until its weights and the KV cache
    of a full batch have room. Memory beyond that becomes KV cache too.
    """

    drop_others = False

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.kept: list[ResidentModel] = []  # in order of use, the least recently used first

    def choose(self, model: int) -> tuple[Device, ...] | None:
        """Return the devices that hold the model, the last used ones if several do; otherwise those
        whose evicted models were used longest ago."""
        for kept in reversed(self.kept):
            if kept.model == model and all(d.instance is None for d in kept.devices):
                return kept.devices
        groups = self.free_groups(self.fleet.profiles[model].width)
        return min(groups, key=lambda group: self.latest_use_evicted(model, group), default=None)

    def latest_use_evicted(self, model: int, devices: tuple[Device, ...]) -> float:
        """Return when the models that a start would evict were used last."""
        return max((kept.last_used for kept in self.evicted_by(model, devices)), default=-math.inf)

    def evicted_by(self, model: int, devices: tuple[Device, ...]) -> list[ResidentModel]:
        """Return the models that a start on these devices evicts."""
        profile = self.fleet.profiles[model]
        want = float(profile.batch * KV_TOKENS * profile.kv_token_bytes)
        room = {d.index: self.fleet.hardware.memory - d.used - want for d in devices}
        for rank, device in enumerate(devices):
            shard = device.shards.get((model, rank))
            room[device.index] -= profile.nbytes - (shard.target if shard else 0.0)
        found = []
        for kept in self.kept:
            here = [d.index for d in kept.devices if d in devices]
            other = kept.model == model and kept.devices != devices
            if here and (other or (kept.model != model and min(room[i] for i in here) < 0)):
                found.append(kept)
                for i in here:
                    room[i] += self.fleet.profiles[kept.model].nbytes
        return found

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        for kept in self.evicted_by(model, devices):
            self.kept.remove(kept)
            for rank, device in enumerate(kept.devices):
                self.fleet.memory.keep(device, device.shards[kept.model, rank], 0)
        self.kept = [k for k in self.kept if (k.model, k.devices) != (model, devices)]
        super().start(model, devices)

    def stop(self, instance: Instance) -> None:
        devices = self.fleet.devices_of(instance)
        self.kept.append(ResidentModel(instance.model, devices, self.fleet.now))
        super().stop(instance)
