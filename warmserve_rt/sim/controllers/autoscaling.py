"""Decide at each event which instances start and stop, and on which devices."""

from __future__ import annotations

from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.placement import Start, start_group
from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance

from .dispatcher import Dispatcher
from .scheduled import ScheduledFleet


class SharedDeviceAutoscaler(Dispatcher):
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
    neighbour_penalty_s
        Seconds that a start loses for each busy neighbour on a device.
    backlog_limit_s
        See Dispatcher. A request that waits because of this limit counts as one without room.
    scale_up_threshold
        The share of a model's capacity above which it starts another instance ahead of need, if
        devices are free.
    idle_timeout_s
        Seconds that an instance without requests is kept.
    competition_weight
        The weight of the other models' starts in the choice of devices.
    competition_window_s
        Seconds within which a start of another model competes for the devices.
    free_device_wait_s
        Seconds assumed until other devices become free.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        *,
        share: bool = True,
        neighbour_penalty_s: float = 0.05,
        backlog_limit_s: float = 0.1,
        scale_up_threshold: float = 0.8,
        idle_timeout_s: float = 5.0,
        competition_weight: float = 1.0,
        competition_window_s: float = 5.0,
        free_device_wait_s: float = 3.0,
    ) -> None:
        super().__init__(backlog_limit_s=backlog_limit_s)
        self.scheduler, self.share = scheduler, share
        self.neighbour_penalty_s = neighbour_penalty_s
        self.scale_up_threshold, self.idle_timeout_s = scale_up_threshold, idle_timeout_s
        self.competition_weight = competition_weight
        self.competition_window_s = competition_window_s
        self.free_device_wait_s = free_device_wait_s

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.waiting: dict[int, None] = {}  # models that found no devices, in order
        window = fleet.workload.history_window
        forecaster = Forecaster(len(fleet.profiles), window=window)
        averages, peaks = fleet.workload.concurrency_history()
        if len(averages):
            forecaster.observe_windows(-window * len(averages), averages, peaks)
        self.scheduler.begin(ScheduledFleet(fleet), forecaster, fleet.workload.service.tolist())
        fleet.after(1.0, self.stop_idle)

    def arrived(self, request: int, model: int) -> None:
        self.scheduler.arrived(
            model, self.fleet.now, self.concurrent[model] + 1, self.fleet.requests.prompt[request]
        )
        super().arrived(request, model)

    def finished(self, instance: Instance, request: int) -> None:
        super().finished(instance, request)
        self.scheduler.finished(instance.model, self.fleet.now, self.concurrent[instance.model])

    def provision(self, model: int) -> None:
        instances = self.fleet.instances[model]
        batch = self.fleet.profiles[model].batch
        if self.pending[model]:
            coming = sum(batch - i.request_count for i in instances if not i.loaded)
            if len(self.pending[model]) > coming and not self.undrain(model):
                self.start(model)
            return
        full = self.scale_up_threshold * batch * sum(not i.draining for i in instances)
        if self.concurrent[model] > full and not self.undrain(model):
            self.start(model, ahead=True)

    def loaded(self, instance: Instance) -> None:
        super().loaded(instance)
        self.provision(instance.model)

    def undrain(self, model: int) -> bool:
        """Let a draining instance of the model serve again. Return whether one was found."""
        for instance in self.fleet.instances[model]:
            if instance.draining:
                instance.draining = False
                self.assign(model)
                return True
        return False

    def start(self, model: int, *, ahead: bool = False) -> bool:
        """Start an instance, and return whether devices were free.

        Parameters
        ----------
        model
            The model.
        ahead
            Whether no request waits for the instance. Otherwise the model waits for devices, and an
            instance of another model is drained.
        """
        devices = self.choose(model)
        if devices is None:
            if not ahead:
                self.waiting[model] = None
                self.drain_one(model)
            return False
        self.waiting.pop(model, None)
        for device in devices:
            for instance in [i for i in device.instances if not i.active]:
                self.fleet.stop(instance)
        self.fleet.start(model, devices)
        self.scheduler.changed()
        return True

    def free_mask(self, model: int) -> int:
        """Return the devices on which the model could start, as a bit mask."""
        fits = self.fleet.memory.fits
        return sum(
            1 << d.index
            for d in self.fleet.devices
            if fits(d, model) and (self.share or not any(d.occupants.values()))
        )

    def expected_start(self, model: int, probability: float) -> Start:
        """Return a start of the model, with the seconds until it is ready on each device.

        Parameters
        ----------
        model
            The model.
        probability
            The probability of the start.
        """
        fleet, width = self.fleet, self.fleet.profiles[model].width
        lost = self.scheduler.lost(model)
        seconds = []
        for device in fleet.devices:
            shard = device.shards.get((model, device.index % width))
            penalty = self.neighbour_penalty_s * sum(i.active for i in device.instances)
            seconds.append(lost[device.index][shard.layers if shard else 0] + penalty)
        cold = max(each[0] for each in lost)
        return Start(probability, width, cold, seconds)

    def choose(self, model: int) -> tuple[Device, ...] | None:
        """Return the devices on which the model should start, or None if too few are free."""
        fleet = self.fleet
        competitors = []
        for other in range(len(fleet.profiles)):
            if other != model:
                running = sum(i.active for i in fleet.instances[other])
                probability = (
                    self.scheduler.urgency(other, running, self.competition_window_s)
                    * self.competition_weight
                )
                if probability > 1e-3:
                    competitors.append(self.expected_start(other, probability))
        found = start_group(
            self.expected_start(model, 1.0),
            self.free_mask(model),
            fleet.node_devices,
            competitors,
            self.free_device_wait_s,
        )
        return None if found is None else tuple(fleet.devices[d] for d in found)

    def drain_one(self, model: int) -> None:
        """Drain an instance whose requests the other instances of its model have room for."""
        width = self.fleet.profiles[model].width
        best = None
        for other, instances in enumerate(self.fleet.instances):
            if any(i.draining for i in instances):
                continue  # one at a time
            serving = [i for i in instances if i.loaded]
            batch = self.fleet.profiles[other].batch
            if len(serving) < 2 or self.concurrent[other] > self.scale_up_threshold * batch * (
                len(serving) - 1
            ):
                continue
            least = min(serving, key=lambda i: i.request_count)
            rank = (len(least.device_indices) < width, least.request_count)
            if best is None or rank < best[0]:
                best = (rank, least)
        if best is not None:
            best[1].draining = True

    def idle(self, instance: Instance) -> None:
        if instance.draining:
            self.fleet.stop(instance)
            self.scheduler.changed()
        self.start_waiting()

    def start_waiting(self) -> None:
        for model in list(self.waiting):
            del self.waiting[model]
            if self.pending[model]:
                self.provision(model)

    def stop_idle(self) -> None:
        """Stop instances that have been idle for long, once a second."""
        now = self.fleet.now
        for instances in self.fleet.instances:
            for instance in list(instances):
                if (
                    instance.loaded
                    and not instance.request_count
                    and now - instance.idle_since > self.idle_timeout_s
                ):
                    self.fleet.stop(instance)
                    self.scheduler.changed()
        if self.waiting:
            self.start_waiting()
        self.fleet.after(1.0, self.stop_idle)
