"""Start and stop the baselines' instances as WarmServe's prototype does (PAPER, Constants)."""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from typing import Any

from warmserve_rt.sim.controllers.dispatcher import Dispatcher
from warmserve_rt.sim.core.devices import Device
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance

UP, DOWN = 0.8, 0.5  # shares of capacity
AVERAGED_S = 5.0  # seconds over which load is averaged
YOUNGEST_S = 5.0  # age in seconds below which an instance is not stopped
CONTROL_S = 0.5  # seconds between two turns of the control loop
ASK_AGAIN_S = 1.0  # seconds after which a request that finds no instance asks again
SERVER_POLL_S = 0.05  # seconds between two checks whether a new server is ready
MAPPING_POLL_S = 0.01  # seconds between two checks whether memory is mapped


class Load:
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
        loop, and a request that finds no instance of its model asks again a second later. A request
        that finds all instances full waits in the queue, as without polls. Without polls, an
        instance starts at the request that needs it, and every waiting request is served as soon as
        an instance has room. The fleet makes the two polls of a start.
    up, down
        The shares of capacity above and below which a model is scaled up and down.
    averaged_s
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
        up: float = UP,
        down: float = DOWN,
        averaged_s: float = AVERAGED_S,
    ) -> None:
        super().__init__()
        if not 0 < down <= up < math.inf:
            raise ValueError(
                f"shares of capacity must be 0 < down <= up < inf, got up {up} and down {down}"
            )
        if not 0 < averaged_s < math.inf:
            raise ValueError(f"averaged_s must be positive and finite seconds, got {averaged_s}")
        self.polls, self.up, self.down, self.averaged_s = polls, up, down, averaged_s

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        self.load = [Load(self.averaged_s) for _ in fleet.profiles]
        self.waiting: dict[int, None] = {}  # models that need an instance and found no devices
        self.asking = [0] * len(fleet.profiles)  # requests that will ask again
        fleet.after(CONTROL_S, self.control)

    def arrived(self, request: int, model: int) -> None:
        self.load[model].set(self.fleet.events.now, self.concurrent[model] + 1)
        super().arrived(request, model)

    def finished(self, instance: Any, request: int) -> None:
        model = instance.model
        self.load[model].set(self.fleet.events.now, self.concurrent[model] - 1)
        super().finished(instance, request)

    def demand(self, model: int) -> None:
        if not self.polls:
            self.scale_up(model)

    def assign(self, model: int) -> None:
        if not self.polls or any(i.loaded for i in self.serving(model)):
            super().assign(model)
            return
        line = self.pending[model]
        while line:
            request = line.popleft()
            self.asking[model] += 1
            self.fleet.after(ASK_AGAIN_S, partial(self.ask, request, model))

    def ask(self, request: int, model: int) -> None:
        self.asking[model] -= 1
        self.pending[model].append(request)
        self.assign(model)

    def idle(self, instance: Any) -> None:
        if instance.draining:
            self.stop(instance)

    def control(self) -> None:
        for model in range(len(self.concurrent)):
            self.scale_up(model)
            self.scale_down(model)
        self.fleet.after(CONTROL_S, self.control)

    def serving(self, model: int) -> list[Instance]:
        return [i for i in self.fleet.instances[model] if not i.draining]

    def scale_up(self, model: int) -> None:
        serving = self.serving(model)
        batch = self.fleet.profiles[model].batch
        load = self.load[model].mean(self.fleet.events.now)
        none = not serving and (self.pending[model] or self.asking[model])
        if none or (serving and load > self.up * batch * len(serving)):
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
        now, serving = self.fleet.events.now, self.serving(model)
        load, batch = self.load[model].mean(now), self.fleet.profiles[model].batch
        if not serving or load >= self.down * batch * len(serving):
            return
        if len(serving) > 1 and load >= self.up * batch * (len(serving) - 1):
            return  # the others would be scaled up again at once
        if len(serving) == 1 and (load > 0 or self.concurrent[model]):
            return
        old = [i for i in serving if i.loaded and now - i.start >= YOUNGEST_S]
        if old:
            instance = min(old, key=lambda i: i.work)
            instance.draining = True
            self.drain(instance)
            if not instance.work:
                self.stop(instance)

    def start(self, model: int, devices: tuple[Device, ...]) -> None:
        self.fleet.start(model, devices, drop_others=self.drop_others)

    def drain(self, instance: Instance) -> None:
        """Called when an instance begins to drain. Subclasses override it."""

    def stop(self, instance: Instance) -> None:
        self.fleet.stop(instance)
        self.start_waiting()

    def choose(self, model: int) -> tuple[Device, ...] | None:
        raise NotImplementedError

    def free_groups(self, width: int) -> list[tuple[Device, ...]]:
        """Return the free aligned groups, or loose groups of free devices if no aligned is free."""
        groups = [
            tuple(node[i : i + width])
            for node in self.fleet.links.nodes
            for i in range(0, len(node) - width + 1, width)
        ]
        free = [g for g in groups if all(d.instance is None for d in g)]
        return free or self.loose_groups(width)

    def loose_groups(self, width: int) -> list[tuple[Device, ...]]:
        """Return for each node its first free devices, if they are enough."""
        free = ([d for d in node if d.instance is None] for node in self.fleet.links.nodes)
        return [tuple(devices[:width]) for devices in free if len(devices) >= width]
