"""Start and stop the baselines' instances as WarmServe's prototype does (PAPER, Constants)."""

from __future__ import annotations

import math
from collections import deque
from functools import partial

from warmserve_rt.sim.controllers.dispatcher import Dispatcher
from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance

SCALE_UP_THRESHOLD, SCALE_DOWN_THRESHOLD = 0.8, 0.5  # shares of capacity
LOAD_WINDOW_S = 5.0  # seconds over which load is averaged
MIN_AGE_S = 5.0  # age in seconds below which an instance is not stopped
CONTROL_S = 0.5  # seconds between two turns of the control loop
RETRY_S = 1.0  # seconds after which a request that finds no instance is retried
SERVER_POLL_S = 0.05  # seconds between two checks whether a new server is ready
MAPPING_POLL_S = 0.01  # seconds between two checks whether memory is mapped


class AverageLoad:
    """The concurrent requests of one model, averaged over the last ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.steps: deque[tuple[float, float, int]] = deque(
            [(0.0, 0.0, 0)]
        )  # time, integral, value

    def set(self, now: float, value: int) -> None:
        time, integral, before = self.steps[-1]
        self.steps.append((now, integral + (now - time) * before, value))
        while len(self.steps) > 1 and self.steps[1][0] <= now - self.seconds:
            self.steps.popleft()

    def mean(self, now: float) -> float:
        time, integral, value = self.steps[-1]
        end = integral + (now - time) * value
        begin = now - self.seconds
        while len(self.steps) > 1 and self.steps[1][0] <= begin:
            self.steps.popleft()
        time, integral, value = self.steps[0]
        return (end - integral - max(0.0, begin - time) * value) / self.seconds


class Autoscaler(Dispatcher):
    """A controller that scales each model separately. Subclasses choose the devices.

    Parameters
    ----------
    polls
        Whether to poll as the prototype's loops do. Instances then start at turns of the control
        loop, and a request that finds no instance of its model is retried a second later. A request
        that finds all instances full waits in the queue, as without polls. Without polls, an
        instance starts at the request that needs it, and every waiting request is served as soon as
        an instance has room. The fleet makes the two polls of a start.
    scale_up_threshold, scale_down_threshold
        The shares of capacity above and below which a model is scaled up and down.
    load_window_s
        Seconds over which the load is averaged.

    Raises
    ------
    ValueError
        If a threshold or the time is invalid.
    """

    drop_others = True
    fleet: Fleet

    def __init__(
        self,
        *,
        polls: bool = False,
        scale_up_threshold: float = SCALE_UP_THRESHOLD,
        scale_down_threshold: float = SCALE_DOWN_THRESHOLD,
        load_window_s: float = LOAD_WINDOW_S,
    ) -> None:
        super().__init__()
        if not 0 < scale_down_threshold <= scale_up_threshold < math.inf:
            raise ValueError(
                "scale_down_threshold and scale_up_threshold must be finite and positive shares of "
                f"capacity in rising order, got {scale_down_threshold} and {scale_up_threshold}"
            )
        if not 0 < load_window_s < math.inf:
            raise ValueError(
                f"load_window_s must be positive and finite seconds, got {load_window_s}"
            )
        self.polls, self.load_window_s = polls, load_window_s
        self.scale_up_threshold = scale_up_threshold
        self.scale_down_threshold = scale_down_threshold

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.loads = [AverageLoad(self.load_window_s) for _ in fleet.profiles]
        self.waiting: dict[int, None] = {}  # models that need an instance and found no devices
        self.retrying = [0] * len(fleet.profiles)  # requests that will be retried
        fleet.after(CONTROL_S, self.control)

    def arrived(self, request: int, model: int) -> None:
        self.loads[model].set(self.fleet.clock.now, self.concurrent[model] + 1)
        super().arrived(request, model)

    def finished(self, instance: Instance, request: int) -> None:
        model = instance.model
        self.loads[model].set(self.fleet.clock.now, self.concurrent[model] - 1)
        super().finished(instance, request)

    def provision(self, model: int) -> None:
        if not self.polls:
            self.scale_up(model)

    def assign(self, model: int) -> None:
        if not self.polls or any(i.loaded for i in self.serving(model)):
            super().assign(model)
            return
        pending = self.pending[model]
        while pending:
            request = pending.popleft()
            self.retrying[model] += 1
            self.fleet.after(RETRY_S, partial(self.retry, request, model))

    def retry(self, request: int, model: int) -> None:
        self.retrying[model] -= 1
        self.pending[model].append(request)
        self.assign(model)

    def idle(self, instance: Instance) -> None:
        if instance.draining:
            self.stop(instance)

    def control(self) -> None:
        for model in range(len(self.concurrent)):
            self.scale_up(model)
            self.scale_down(model)
        self.fleet.after(CONTROL_S, self.control)

    def serving(self, model: int) -> list[Instance]:
        """Return the instances of the model that are not draining."""
        return [i for i in self.fleet.instances[model] if not i.draining]

    def scale_up(self, model: int) -> None:
        serving = self.serving(model)
        batch = self.fleet.profiles[model].batch
        load = self.loads[model].mean(self.fleet.clock.now)
        none = not serving and (self.pending[model] or self.retrying[model])
        if none or (serving and load > self.scale_up_threshold * batch * len(serving)):
            if model not in self.waiting:
                self.waiting[model] = None
                self.start_waiting()
        else:
            self.waiting.pop(model, None)

    def start_waiting(self) -> None:
        for model in list(self.waiting):
            devices = self.choose(model)
            if devices is not None:
                del self.waiting[model]
                self.start(model, devices)

    def scale_down(self, model: int) -> None:
        """Drain the instance with least work. Drain the last one only after a time without load."""
        now, serving = self.fleet.clock.now, self.serving(model)
        load, batch = self.loads[model].mean(now), self.fleet.profiles[model].batch
        if not serving or load >= self.scale_down_threshold * batch * len(serving):
            return
        if len(serving) > 1 and load >= self.scale_up_threshold * batch * (len(serving) - 1):
            return  # the others would be scaled up again at once
        if len(serving) == 1 and (load > 0 or self.concurrent[model]):
            return
        old = [i for i in serving if i.loaded and now - i.started_at >= MIN_AGE_S]
        if old:
            instance = min(old, key=lambda i: i.request_count)
            instance.draining = True
            self.drain(instance)
            if not instance.request_count:
                self.stop(instance)

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        self.fleet.start(model, devices, drop_others=self.drop_others)

    def drain(self, instance: Instance) -> None:
        """Do nothing. Subclasses override it to act when an instance begins to drain."""

    def stop(self, instance: Instance) -> None:
        self.fleet.stop(instance)
        self.start_waiting()

    def choose(self, model: int) -> tuple[Device, ...] | None:
        """Return the devices on which the model should start, or None if too few are free."""
        raise NotImplementedError

    def free_groups(self, width: int) -> list[tuple[Device, ...]]:
        """Return the free aligned groups, or other free devices if no aligned group is free."""
        groups = [
            tuple(node[i : i + width])
            for node in self.fleet.links.nodes
            for i in range(0, len(node) - width + 1, width)
        ]
        free = [g for g in groups if all(d.instance is None for d in g)]
        return free or self.unaligned_groups(width)

    def unaligned_groups(self, width: int) -> list[tuple[Device, ...]]:
        """Return for each node its first free devices, if they are enough."""
        free = ([d for d in node if d.instance is None] for node in self.fleet.links.nodes)
        return [tuple(devices[:width]) for devices in free if len(devices) >= width]
