"""Decide at each event which instances start and stop, and on which devices."""

from __future__ import annotations

from typing import Any

from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.placement import Start, start_group
from warmserve_rt.scheduling.scheduler import Scheduler

from .dispatcher import Dispatcher
from .scheduled import ScheduledFleet


class Starts(Dispatcher):
    """A controller that starts an instance when requests wait for room, or soon will.

    Instances share devices if they fit into the memory together, because resident layers beside a
    busy neighbour are usable sooner there than after a load elsewhere. An instance without requests
    is stopped at once when another model needs its memory. If no devices are free, the model waits
    in a queue. An instance whose requests the other instances of its model can take over is then
    drained.

    Parameters
    ----------
    scheduler
        The scheduler that decides which layers are resident.
    share
        Whether instances may share devices.
    crowd
        Seconds that a start loses for each busy neighbour on a device.
    late
        See Dispatcher. A request that waits because of this limit counts as one without room.
    up
        The share of a model's capacity above which it starts another instance ahead of need, if
        devices are free.
    linger
        Seconds that an instance without requests is kept.
    rivalry
        The weight of the other models' starts in the choice of devices.
    wait
        Seconds assumed until other devices become free.
    occupied
        Seconds within which a start of another model counts as a rival.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        share: bool = True,
        crowd: float = 0.05,
        late: float = 0.1,
        up: float = 0.8,
        linger: float = 5.0,
        rivalry: float = 1.0,
        wait: float = 3.0,
        occupied: float = 5.0,
    ) -> None:
        super().__init__(late=late)
        self.scheduler = scheduler
        self.share, self.crowd = share, crowd
        self.up, self.linger = up, linger
        self.rivalry, self.wait, self.occupied = rivalry, wait, occupied

    def begin(self, fleet: Any) -> None:
        super().begin(fleet)
        self.waiting: dict[int, None] = {}  # models that found no devices, in order
        window = fleet.workload.history_window
        forecaster = Forecaster(len(fleet.profiles), window=window)
        averages, peaks = fleet.workload.concurrency_history()
        if len(averages):
            forecaster.observe_windows(-window * len(averages), averages, peaks)
        self.scheduler.begin(ScheduledFleet(fleet), forecaster, fleet.workload.service)
        fleet.after(1.0, self.tick)

    def arrived(self, request: int, model: int) -> None:
        self.scheduler.arrived(
            model, self.fleet.now, self.concurrent[model] + 1, self.fleet.prompt[request]
        )
        super().arrived(request, model)

    def finished(self, instance: Any, request: int) -> None:
        super().finished(instance, request)
        self.scheduler.finished(instance.model, self.fleet.now, self.concurrent[instance.model])

    def demand(self, model: int) -> None:
        instances = self.fleet.instances[model]
        batch = self.fleet.profiles[model].batch
        if self.pending[model]:
            coming = sum(batch - i.work for i in instances if not i.loaded)
            if len(self.pending[model]) > coming and not self.take_back(model):
                self.start(model)
            return
        full = self.up * batch * sum(not i.draining for i in instances)
        if self.concurrent[model] > full and not self.take_back(model):
            self.start(model, ahead=True)

    def loaded(self, instance: Any) -> None:
        super().loaded(instance)
        self.demand(instance.model)

    def take_back(self, model: int) -> bool:
        """Let a draining instance of the model serve again. Return whether one was found."""
        for instance in self.fleet.instances[model]:
            if instance.draining:
                instance.draining = False
                self.assign(model)
                return True
        return False

    def start(self, model: int, *, ahead: bool = False) -> bool:
        devices = self.choose(model)
        if devices is None:
            if not ahead:
                self.waiting[model] = None
                self.relieve(model)
            return False
        self.waiting.pop(model, None)
        for device in devices:
            for instance in [i for i in device.instances if not i.active]:
                self.fleet.stop(instance)
        self.fleet.start(model, devices)
        self.scheduler.changed()
        return True

    def free(self, model: int) -> int:
        """Return the devices on which the model could start, as a mask."""
        fits = self.fleet.fits
        return sum(
            1 << d.index
            for d in self.fleet.devices
            if fits(d, model) and (self.share or not any(d.occupants.values()))
        )

    def possible(self, model: int, need: float) -> Start:
        """Return a start of the model, with the seconds until it is ready on each device."""
        fleet, width = self.fleet, self.fleet.profiles[model].width
        lost = self.scheduler.lost(model)
        seconds = []
        for device in fleet.devices:
            shard = device.shards.get((model, device.index % width))
            crowd = self.crowd * sum(i.active for i in device.instances)
            seconds.append((lost[shard.layers] if shard else lost[0]) + crowd)
        return Start(need, width, lost[0], seconds)

    def choose(self, model: int) -> Any:
        fleet = self.fleet
        rivals = []
        for other in range(len(fleet.profiles)):
            if other != model:
                running = sum(i.active for i in fleet.instances[other])
                need = self.scheduler.urgency(other, running, self.occupied) * self.rivalry
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
        """Drain an instance whose requests the other instances of its model have room for."""
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
        """Stop instances that have been idle for long, once a second."""
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
