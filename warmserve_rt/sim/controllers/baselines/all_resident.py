"""h0: all layers of all models are resident on all devices; starts are those of the baseline."""

from __future__ import annotations

from warmserve_rt.sim.core.devices import Device

from .autoscaler import Autoscaler


class AllResident(Autoscaler):
    """A bound with unlimited memory: the bytes of models are not counted against the hardware."""

    drop_others = False

    def choose(self, model: int) -> tuple[Device, ...] | None:
        groups = self.free_groups(self.fleet.profiles[model].width)
        return groups[0] if groups else None

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        for rank, device in enumerate(devices):
            self.fleet.memory.preload(device, model, rank)
        super().start(model, devices)
