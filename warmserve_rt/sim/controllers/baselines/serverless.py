"""Autoscaling with a host-memory tier, in the manner of ServerlessLLM.

Devices keep no layers for later starts, and the host memory of nodes keeps checkpoints. A start
uses the devices with the shortest estimated start-up (its locality-aware placement)."""

from __future__ import annotations

from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.instance import Instance

from .autoscaler import Autoscaler


class Serverless(Autoscaler):
    """A controller that drops the layers of stopped instances, and prefers nodes whose host
    memory has the model."""

    def choose(self, model: int) -> tuple[Device, ...] | None:
        groups = self.free_groups(self.fleet.profiles[model].width)
        host_memories = self.fleet.links.host_memories
        return min(groups, key=lambda g: model not in host_memories[g[0].node], default=None)

    def stop(self, instance: Instance) -> None:
        self.fleet.stop(instance, drop=True)
        self.start_waiting()
