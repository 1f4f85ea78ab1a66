"""Autoscaling with a host-memory tier, in the manner of ServerlessLLM.

Devices keep no layers for later starts, and the host memory of nodes keeps checkpoints. A start
uses the devices with the shortest estimated start-up (its locality-aware placement)."""

from __future__ import annotations

from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.instance import Instance

from .autoscaler import Autoscaler


class Autoscaling(Autoscaler):
    def choose(self, model: int) -> tuple[Device, ...] | None:
        groups = self.free_groups(self.fleet.profiles[model].width)
        hosted = self.fleet.hosted
        return min(groups, key=lambda g: model not in hosted[g[0].node], default=None)

    def stop(self, instance: Instance) -> None:
        self.fleet.stop(instance, drop=True)
        self.start_waiting()
