"""Requests to instances: one line for each model, from which instances take as they have room.

What every dispatcher shares. When to start and stop instances, and where, its subclasses say.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any


class Dispatcher:
    """Keeps requests in order of arrival for each model and hands them to instances with room.

    An instance has a ``model``, is ``loaded`` and ``draining`` or not, has ``work`` requests and
    ``backlog(now)`` seconds of prefill before one that comes now, and can ``take(request)``. Its
    ``devices`` say which ``instances`` there are on them.

    A request that no instance has room for waits in line, so that whichever has room first serves
    it: that is the instance with the earliest first token, without a guess at when that would be.
    Among instances with room it is the one with the least ``backlog``; of equals the fullest, so
    that the others run empty and their devices can serve others. One with a backlog of more than
    ``late`` seconds has no room.
    """

    def __init__(self, *, late: float = float("inf")) -> None:
        self.late = late
        self.pending: list[deque[int]] = []
        self.concurrent: list[int] = []

    def begin(self, fleet: Any) -> None:
        self.fleet = fleet
        self.pending = [deque() for _ in fleet.profiles]
        self.concurrent = [0] * len(fleet.profiles)

    def arrived(self, request: int, model: int) -> None:
        self.concurrent[model] += 1
        self.pending[model].append(request)
        self.assign(model)
        self.demand(model)

    def finished(self, instance: Any, request: int) -> None:
        self.concurrent[instance.model] -= 1
        if self.pending[instance.model]:
            self.assign(instance.model)
        # What it leaves in memory may be what another model on these devices waits for.
        for device in instance.devices:
            for other in device.instances:
                if other is not instance and self.pending[other.model]:
                    self.assign(other.model)

    def loaded(self, instance: Any) -> None:
        self.assign(instance.model)

    def prefilled(self, instance: Any) -> None:
        """A first token has come."""
        if self.pending[instance.model]:
            self.assign(instance.model)

    def idle(self, instance: Any) -> None:
        """An instance that is loaded has nothing to do."""

    def demand(self, model: int) -> None:
        """A request has come."""

    def assign(self, model: int) -> None:
        """Gives waiting requests to whoever has room."""
        line, fleet = self.pending[model], self.fleet
        while line:
            instance = self.route(fleet.instances[model], line[0])
            if instance is None:
                return
            instance.take(line.popleft())

    def route(self, instances: Sequence[Any], request: int) -> Any:
        """The instance that should take it, or None while none has room."""
        fleet = self.fleet
        now = fleet.events.now
        best, best_backlog = None, 0.0
        for instance in instances:
            if not instance.loaded or instance.draining:
                continue
            backlog = instance.backlog(now)
            if backlog > self.late or not fleet.reserve(instance, request):
                continue
            if (
                best is None
                or backlog < best_backlog
                or (backlog == best_backlog and instance.work > best.work)
            ):
                best, best_backlog = instance, backlog
        return best
