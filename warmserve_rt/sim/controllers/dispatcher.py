"""Assign requests to instances: one queue for each model, from which instances with room take."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance


class Dispatcher:
    """A queue of requests for each model, in order of arrival, that are assigned to instances.

    Subclasses decide when and on which devices instances start and stop.

    If no instance has room for a request, it waits in the queue until the first instance has room.
    This instance gives the earliest first token, without an estimate of its time. Among instances
    with room, the one with the smallest ``backlog`` is chosen. Among equals it is the fullest, so
    that the others become empty and their devices can serve other models.

    Parameters
    ----------
    backlog_limit_s
        Seconds of prefill before a new request above which an instance has no room.
    """

    def __init__(self, *, backlog_limit_s: float = float("inf")) -> None:
        self.backlog_limit_s = backlog_limit_s
        self.pending: list[deque[int]] = []
        self.concurrent: list[int] = []

    def begin(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.pending = [deque() for _ in fleet.profiles]
        self.concurrent = [0] * len(fleet.profiles)

    def arrived(self, request: int, model: int) -> None:
        self.concurrent[model] += 1
        self.pending[model].append(request)
        self.assign(model)
        self.provision(model)

    def finished(self, instance: Instance, request: int) -> None:
        self.concurrent[instance.model] -= 1
        if self.pending[instance.model]:
            self.assign(instance.model)
        # The KV cache of the request may be the memory that a neighbour waits for.
        devices = self.fleet.devices
        for index in instance.device_indices:
            for other in devices[index].instances:
                if other is not instance and self.pending[other.model]:
                    self.assign(other.model)

    def loaded(self, instance: Instance) -> None:
        self.assign(instance.model)

    def prefilled(self, instance: Instance) -> None:
        """Assign waiting requests after a prefill has ended."""
        if self.pending[instance.model]:
            self.assign(instance.model)

    def idle(self, instance: Instance) -> None:
        """Do nothing. Subclasses override it to act when a loaded instance has no work."""

    def provision(self, model: int) -> None:
        """Do nothing. Subclasses override it to start instances when a request has arrived."""

    def assign(self, model: int) -> None:
        """Assign waiting requests to instances with room."""
        pending, fleet = self.pending[model], self.fleet
        while pending:
            instance = self.route(fleet.instances[model], pending[0])
            if instance is None:
                return
            instance.take(pending.popleft())

    def route(self, instances: Sequence[Instance], request: int) -> Instance | None:
        """Return the instance that should take the request, or None if no instance has room.

        Parameters
        ----------
        instances
            The instances of the request's model.
        request
            The request.
        """
        fleet = self.fleet
        now = fleet.clock.now
        best: Instance | None = None
        best_backlog = 0.0
        for instance in instances:
            if not instance.loaded or instance.draining:
                continue
            backlog = instance.backlog(now)
            if backlog > self.backlog_limit_s or not fleet.kv_caches.reserve(instance, request):
                continue
            if (
                best is None
                or backlog < best_backlog
                or (backlog == best_backlog and instance.request_count > best.request_count)
            ):
                best, best_backlog = instance, backlog
        return best
