"""Slow down instances that share devices while their neighbours compute."""

from __future__ import annotations

from collections.abc import Sequence

from .devices import Device
from .instance import Instance


class Interference:
    """The slowdown of instances by the others on their devices.

    Parameters
    ----------
    devices
        The devices.
    factor
        The share by which each computing neighbour slows an instance.
    partitioned
        Whether each of n instances on a device has an n-th part of the device instead, even if its
        neighbours are idle.
    """

    def __init__(self, devices: Sequence[Device], factor: float, *, partitioned: bool) -> None:
        self.devices, self.factor, self.partitioned = devices, factor, partitioned

    def slowdown(self, instance: Instance) -> float:
        """Return the current slowdown of the instance relative to running alone.

        The device with the most computing neighbours decides.
        """
        devices = self.devices
        if self.partitioned:
            return float(max(len(devices[i].instances) for i in instance.device_indices))
        neighbours = max(
            sum(other.computing for other in devices[i].instances if other is not instance)
            for i in instance.device_indices
        )
        return 1.0 + self.factor * neighbours

    def notify_neighbours(self, instance: Instance) -> None:
        """Adapt the instances on the same devices after this one, or its work, starts or stops."""
        devices = [self.devices[index] for index in instance.device_indices]
        for other in {other: None for device in devices for other in device.instances}:
            slowdown = self.slowdown(other)
            if slowdown != other.slowdown:
                other.set_slowdown(slowdown)
