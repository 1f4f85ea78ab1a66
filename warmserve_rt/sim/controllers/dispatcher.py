"""Assign requests to instances: one queue for each model, from which instances with room take.

All dispatchers share this module. Subclasses decide when and on which devices instances start and
stop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any


class Dispatcher:
    """A queue of requests for each model, in order of arrival, that are assigned to instances.

    An instance has a ``model``, may be ``loaded`` and ``draining``, has ``work`` requests and
    ``backlog(now)`` seconds of prefill before a request that arrives now, and can
    ``take(request)``. Each of its ``devices`` lists the ``instances`` on it.

    If no instance has room for a request, it waits in the queue until the first instance has room.
    This instance gives the earliest first token, without an estimate of its time. Among instances
    with room, the one with the smallest ``backlog`` is chosen. Among equals it is the fullest, so
    that the others become empty and their devices can serve other models.

    Parameters
    ----------
    late
        Seconds of backlog above which an instance has no room.
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
        # The KV cache of the request may be the memory that a neighbour waits for.
        for device in instance.devices:
            for other in device.instances:
                if other is not instance and self.pending[other.model]:
                    self.assign(other.model)

    def loaded(self, instance: Any) -> None:
        self.assign(instance.model)

    def prefilled(self, instance: Any) -> None:
        """Assign waiting requests after a prefill has ended."""
        if self.pending[instance.model]:
            self.assign(instance.model)

    def idle(self, instance: Any) -> None:
        """Called when a loaded instance has no work. Subclasses override it."""

    def demand(self, model: int) -> None:
        """Called when a request has arrived. Subclasses override it to start instances."""

    def assign(self, model: int) -> None:
        """Assign waiting requests to instances with room."""
        line, fleet = self.pending[model], self.fleet
        while line:
            instance = self.route(fleet.instances[model], line[0])
            if instance is None:
                return
            instance.take(line.popleft())

    def route(self, instances: Sequence[Any], request: int) -> Any:
        """Return the instance that should take the request, or None if no instance has room."""
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
