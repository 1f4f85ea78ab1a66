"""When instances start and stop, and on which devices: at the event that calls for it."""

from __future__ import annotations

from typing import Any

from .dispatch import Dispatcher
from .policy.forecast import Forecaster
from .policy.placement import Start, start_group
from .scheduler import Scheduler


class Starts(Dispatcher):
    """Starts an instance when requests wait that no instance has room for, or soon will.

    An instance without requests gives its devices up at once when another model wants them. Where
    no devices are to be had, the model waits in line, and an instance whose requests others of its
    model can take over is drained for it. ``up``: the share of a model's capacity from which on it
    starts another instance ahead of need, if devices are free. ``linger``: seconds that an instance
    with nothing to do is kept.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        up: float = 0.8,
        linger: float = 5.0,
        slack: float = 0.0,
        rivalry: float = 1.0,
        wait: float = 3.0,
        occupied: float = 5.0,
    ) -> None:
        super().__init__(slack=slack)
        self.scheduler = scheduler
        self.up, self.linger = up, linger
        self.rivalry, self.wait, self.occupied = rivalry, wait, occupied

    def begin(self, fleet: Any) -> None:
        super().begin(fleet)
        self.waiting: dict[int, None] = {}  # models that found no devices, the first first
        window = fleet.workload.history_window
        forecaster = Forecaster(len(fleet.profiles), window=window)
        averages, peaks = fleet.workload.concurrency_history()
        if len(averages):
            forecaster.observe_windows(-window * len(averages), averages, peaks)
        self.scheduler.begin(fleet, forecaster, fleet.workload.service)
        fleet.after(1.0, self.tick)

    def arrived(self, request: int, model: int) -> None:
        self.scheduler.demand.arrived(
            model, self.fleet.now, self.concurrent[model] + 1, self.fleet.prompt[request]
        )
        super().arrived(request, model)

    def finished(self, instance: Any, request: int) -> None:
        super().finished(instance, request)
        self.scheduler.demand.finished(
            instance.model, self.fleet.now, self.concurrent[instance.model]
        )

    def demand(self, model: int) -> None:
        instances = self.fleet.instances[model]
        batch = self.fleet.profiles[model].batch
        if self.pending[model]:
            coming = sum(batch - i.work for i in instances if not i.loaded)
            if len(self.pending[model]) > coming and not self.take_back(model):
                self.start(model)
        elif self.concurrent[model] > self.up * batch * sum(
            not i.draining for i in instances
        ) and not self.take_back(model):
            self.start(model, ahead=True)

    def take_back(self, model: int) -> bool:
        """A draining instance serves again."""
        for instance in self.fleet.instances[model]:
            if instance.draining:
                instance.draining = False
                self.assign(model)
                return True
        return False

    def start(self, model: int, *, ahead: bool = False) -> bool:
        devices = self.choose(model, ahead=ahead)
        if devices is None:
            if not ahead:
                self.waiting[model] = None
                self.relieve(model)
            return False
        self.waiting.pop(model, None)
        for device in devices:
            if device.instance is not None:
                self.fleet.stop(device.instance)
        self.fleet.start(model, devices)
        self.scheduler.changed()
        return True

    def free(self, model: int) -> int:
        """The devices on which it could start, as a mask."""
        mask = 0
        for device in self.fleet.devices:
            i = device.instance
            if i is None or (i.loaded and not i.work and i.model != model):
                mask |= 1 << device.index
        return mask

    def possible(self, model: int, need: float) -> Start:
        """A start of it, with what each device holds of it now."""
        fleet, width = self.fleet, self.fleet.profiles[model].width
        lost = self.scheduler.demand.lost[model]
        seconds = []
        for device in fleet.devices:
            shard = device.shards.get((model, device.index % width))
            seconds.append(lost[shard.layers] if shard else lost[0])
        return Start(need, width, lost[0], seconds)

    def choose(self, model: int, *, ahead: bool) -> Any:
        fleet = self.fleet
        rivals = []
        for other in range(len(fleet.profiles)):
            if other != model:
                running = sum(i.work > 0 or not i.loaded for i in fleet.instances[other])
                need = self.scheduler.demand.urgency(other, running, self.occupied) * self.rivalry
                if need > 1e-3:
                    rivals.append(self.possible(other, need))
        found = start_group(
            self.possible(model, 1.0),
            self.free(model),
            fleet.node_devices,
            rivals,
            self.wait,
        )
        return None if found is None else tuple(fleet.devices[d] for d in found)

    def relieve(self, model: int) -> None:
        """Drains an instance whose work the others of its model have room for."""
        width = self.fleet.profiles[model].width
        best = None
        for other, instances in enumerate(self.fleet.instances):
            if any(i.draining for i in instances):
                continue  # one at a time
            serving = [i for i in instances if i.loaded]
            batch = self.fleet.profiles[other].batch
            if len(serving) < 2 or self.concurrent[other] > self.up * batch * (len(serving) - 1):
                continue
            least = min(serving, key=lambda i: i.work)
            rank = (len(least.devices) < width, least.work)
            if best is None or rank < best[0]:
                best = (rank, least)
        if best is not None:
            best[1].draining = True

    def idle(self, instance: Any) -> None:
        if instance.draining:
            self.fleet.stop(instance)
            self.scheduler.changed()
        self.start_waiting()

    def start_waiting(self) -> None:
        for model in list(self.waiting):
            del self.waiting[model]
            if self.pending[model]:
                self.demand(model)

    def tick(self) -> None:
        """From time to time: instances that have been idle for long end."""
        now = self.fleet.now
        for instances in self.fleet.instances:
            for instance in list(instances):
                if (
                    instance.loaded
                    and not instance.work
                    and now - instance.idle_since > self.linger
                ):
                    self.fleet.stop(instance)
                    self.scheduler.changed()
        if self.waiting:
            self.start_waiting()
        self.fleet.after(1.0, self.tick)
