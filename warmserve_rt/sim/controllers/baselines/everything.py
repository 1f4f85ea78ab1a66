"""h0: every layer of every model is resident on every device; starts are those of the baseline."""

from __future__ import annotations

from warmserve_rt.sim.core.devices import Device

from .autoscaler import Autoscaler


class Everything(Autoscaler):
    """Its memory is not that of the hardware: what models take of it is not counted."""

    drop_others = False

    def choose(self, model: int) -> tuple[Device, ...] | None:
        groups = self.free_groups(self.fleet.profiles[model].width)
        return groups[0] if groups else None

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        for rank, device in enumerate(devices):
            self.fleet.preload(device, model, rank)
        super().start(model, devices)
