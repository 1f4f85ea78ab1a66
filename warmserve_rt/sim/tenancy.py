"""Instances that share devices at all times, and what that does to each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .instance import Instance

if TYPE_CHECKING:
    from .devices import Device
    from .fleet import Fleet


class Tenant(Instance):
    """An instance on devices that it shares with others, for good.

    KV caches of all that share a device lie in the memory that their weights leave; each holds what
    its requests need. While b others work on the one of its devices where the most do, its prefills
    and steps take 1 + ``interference`` b times as long; or, with ``interference`` None, it has the
    n-th part of the device at all times, where n share it, and they take n times as long.
    """

    __slots__ = ("held", "interference", "working")

    def __init__(
        self, fleet: Fleet, model: int, devices: tuple[Device, ...], interference: float | None
    ) -> None:
        super().__init__(fleet, model, fleet.profiles[model], devices, streaming=False)
        self.interference = interference
        self.start = 0.0  # before the first request nobody serves
        self.working = False
        self.held: dict[int, float] = {}  # bytes of KV cache on each device, by request

    @property
    def occupied(self) -> float:
        return sum(1 / len(device.tenants) for device in self.devices)

    def room(self) -> float:
        """Bytes that its KV cache can grow by on each device."""
        memory = self.fleet.hardware.memory
        return min(memory - device.used for device in self.devices)

    def admits(self, request: int) -> bool:
        """Whether it can take it now. A request larger than any room is cut, not stuck."""
        if not self.loaded or self.work >= self.profile.batch:
            return False
        return self.need(request) <= self.room() or not any(d.kv for d in self.devices)

    def need(self, request: int) -> float:
        """Bytes of its KV cache on each device."""
        return float(self.fleet.tokens[request]) * self.profile.kv_token_bytes

    def take(self, request: int) -> None:
        self._hold(request, min(self.need(request), self.room()))
        super().take(request)

    def ready(self) -> None:
        super().ready()
        if self.interference is None:
            self.pace(float(max(len(device.tenants) for device in self.devices)))

    def _hold(self, request: int, nbytes: float) -> None:
        self.held[request] = nbytes
        for device in self.devices:
            device.kv += nbytes
            device.used += nbytes

    def _finish(self, request: int, now: float) -> None:
        nbytes = self.held.pop(request)
        for device in self.devices:
            device.kv -= nbytes
            device.used -= nbytes
        super()._finish(request, now)

    def _next(self, now: float) -> None:
        super()._next(now)
        working = self.prefilling >= 0 or bool(self.decoding)
        if working != self.working:
            self.working = working
            for other in {other: None for d in self.devices for other in d.tenants}:
                if other is not self:
                    other.disturbed()

    def disturbed(self) -> None:
        """Who works beside it has changed."""
        if self.interference is None:
            return
        others = max(
            sum(other.working for other in device.tenants if other is not self)
            for device in self.devices
        )
        slow = 1.0 + self.interference * others
        if slow != self.slow:
            self.pace(slow)
