"""The simulated fleet: the state and the operations of a controller, and the results of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np

from warmserve_rt.sim.workload.workloads import Workload

from .devices import KV_STEP, Device, Hardware
from .events import Timer
from .instance import Instance
from .links import Flow
from .memory import Memory

LEAD_S = 60.0  # seconds before the first request, in which layers can be loaded


class Controller(Protocol):
    """The policy of a fleet. Each method is called after its event has happened."""

    def begin(self, fleet: Fleet) -> None: ...
    def arrived(self, request: int, model: int) -> None: ...
    def prefilled(self, instance: Instance) -> None: ...
    def finished(self, instance: Instance, request: int) -> None: ...
    def loaded(self, instance: Instance) -> None: ...
    def idle(self, instance: Instance) -> None: ...


class Fleet(Memory):
    """Devices, links and instances under one controller, serving one workload.

    Parameters
    ----------
    workload
        The models and their requests.
    hardware
        The devices, links and host memory.
    controller
        The policy.
    switch_s
        Seconds from a start until missing layers begin to load and resident layers can be used.
    engine_start_s
        Seconds that are added to a start if no engine process waits on the devices.
    streaming
        Whether instances prefill while layers arrive.
    elastic_kv
        Whether an instance takes only the KV cache that its requests need, and leaves the rest to
        layers of other models and other instances. Otherwise it takes all memory beside its
        weights.
    partitioned
        Whether each of n instances on a device has an n-th part of the device, even if its
        neighbours are idle, as the percentages of an MPS server divide it.
    server_poll_s
        For runtimes that poll: seconds between two checks whether a started instance is loaded.
    mapping_poll_s
        For runtimes that poll: seconds until the load of missing layers notices that their memory
        is mapped.

    Raises
    ------
    ValueError
        If ``switch_s`` or ``engine_start_s`` is negative or not finite.
    """

    def __init__(
        self,
        workload: Workload,
        hardware: Hardware,
        controller: Controller,
        *,
        switch_s: float = 0.01,
        engine_start_s: float = 0.0,
        streaming: bool = False,
        elastic_kv: bool = False,
        partitioned: bool = False,
        server_poll_s: float = 0.0,
        mapping_poll_s: float = 0.0,
    ) -> None:
        if not (0 <= switch_s < float("inf") and 0 <= engine_start_s < float("inf")):
            raise ValueError(
                "a start must take finite seconds of at least 0, "
                f"got {switch_s} s and {engine_start_s} s for an engine"
            )
        super().__init__(workload.models, hardware)
        self.workload, self.controller = workload, controller
        self.switch_s, self.engine_start_s = switch_s, engine_start_s
        self.streaming, self.elastic_kv = streaming, elastic_kv
        self.partitioned = partitioned
        self.server_poll_s, self.mapping_poll_s = server_poll_s, mapping_poll_s
        self.bandwidth = hardware.bandwidth * (1 - hardware.background_share)
        self.node_devices = hardware.node_devices
        self.time: list[float] = workload.time.tolist()
        self.prompt: list[int] = workload.prompt.tolist()
        self.output: list[int] = workload.output.tolist()
        self.tokens: list[int] = (workload.prompt + workload.output).tolist()
        self.model_of: list[int] = workload.model.tolist()
        self.first_token = np.full(len(workload.time), np.nan)
        self.finished = np.full(len(workload.time), np.nan)
        self.refused = np.zeros(len(workload.time), bool)
        self.instances: list[list[Instance]] = [[] for _ in self.profiles]
        self.device_seconds = 0.0  # seconds of devices with an instance, from the first request on
        self.occupied_since = [0.0] * hardware.devices
        self.starts = 0
        self.start_layers = self.start_hits = 0

    def run(self) -> None:
        """Run until every request is served or refused. Raise RuntimeError if some never are."""
        events, arrived = self.events, self.controller.arrived
        events.now = -LEAD_S
        self.controller.begin(self)
        for request, (time, model) in enumerate(zip(self.time, self.model_of, strict=True)):
            events.run(time)
            arrived(request, model)
        # The events of a controller that polls never end.
        deadline = events.now + 3600.0
        while (np.isnan(self.finished) & ~self.refused).any():
            events.run(events.now + 10.0)
            if events.now > deadline:
                left = int((np.isnan(self.finished) & ~self.refused).sum())
                raise RuntimeError(
                    f"{left} requests were not served an hour after the last arrived"
                )
        for device in self.devices:
            if device.instances:
                self._count(device)
            for shard in device.shards.values():
                if shard.flow:
                    shard.flow.settle(events.now)
                self.wasted += shard.unused

    @property
    def now(self) -> float:
        return self.events.now

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.events.schedule(Timer(call), self.events.now + seconds)

    # Called by a controller.

    def start(
        self, model: int, devices: Sequence[Device], *, drop_others: bool = False
    ) -> Instance:
        """Start an instance. A load of its layers that is in progress continues.

        Instances with elastic KV caches may share devices.

        Parameters
        ----------
        model
            The model.
        devices
            Devices of one node, in the order of their ranks.
        drop_others
            Whether to drop all layers that no instance uses from these devices. Otherwise only as
            many are evicted as the weights and the KV cache need, the least valuable first.

        Raises
        ------
        ValueError
            If the number of devices is not the model's width, if the devices are not of one node or
            have too little memory, or if one of them has an instance of the model. Without elastic
            KV caches, also if one of them has an instance of any model.
        """
        self._check_start(model, devices)
        profile, ends = self.profiles[model], self.ends[model]
        instance = Instance(self, model, profile, tuple(devices), self.streaming)
        self.instances[model].append(instance)
        self.starts += 1
        for rank, device in enumerate(devices):
            if not device.instances:
                self.occupied_since[device.index] = max(self.events.now, 0.0)
            device.instances.append(instance)
            shard = self._shard(device, model, rank)
            flow = shard.flow
            if flow:
                self.links.stop(flow)
            shard.pinned, shard.unused = True, 0.0
            self.start_layers += len(ends)
            self.start_hits += shard.layers
            if drop_others:
                for other in [s for s in device.shards.values() if not s.pinned]:
                    self.keep(device, other, 0)
            self._make_room(device, ends[-1] - shard.target)
            self._resize(device, shard, ends[-1])
            if flow:
                self.links.load(device, shard, priority=flow.priority)
        if not self.elastic_kv:
            left = min(math.floor(device.memory - device.used) for device in devices)
            self._set_kv(instance, float(max(left, 0)))
        self.disturb(instance)
        delay = self.switch_s + self.engine_start_s
        if any(d.shards[model, r].resident < ends[-1] for r, d in enumerate(devices)):
            delay += self.mapping_poll_s
        self.after(delay, lambda: self._load(instance))
        return instance

    def refuse(self, request: int) -> None:
        """Record that a request is never served."""
        self.refused[request] = True

    def _check_start(self, model: int, devices: Sequence[Device]) -> None:
        profile, indices = self.profiles[model], [device.index for device in devices]
        if len(set(indices)) != profile.width or len(indices) != profile.width:
            raise ValueError(
                f"{profile.name} needs {profile.width} distinct devices, got {indices}"
            )
        if len({device.node for device in devices}) > 1:
            raise ValueError(f"devices must be of one node, got {indices}")
        there = [each for device in devices for each in device.instances]
        if any(not self.elastic_kv or each.model == model for each in there):
            raise ValueError(f"devices {indices} must be free, but one has an instance")
        if any(device.spare < profile.nbytes for device in devices):
            raise ValueError(f"{profile.name} is larger than the free memory of devices {indices}")

    def _load(self, instance: Instance) -> None:
        """Move the loads of missing layers to the foreground; use resident layers from now on."""
        ends = self.ends[instance.model]
        instance.arrivals = [self.events.now] * len(ends)
        flows = []
        for rank, device in enumerate(instance.devices):
            shard = device.shards[instance.model, rank]
            if shard.resident < ends[-1]:
                instance.missing.add(device.index)
                flows.append(shard.flow or self.links.load(device, shard, priority=float("inf")))
        for flow in flows:
            self.links.urge(flow, partial(self._arrived, instance, flow))
        if not flows:
            self._ready(instance)

    def _arrived(self, instance: Instance, flow: Flow) -> None:
        come = flow.arrivals(self.ends[instance.model])
        instance.arrivals = list(map(max, instance.arrivals, come))
        instance.missing.discard(flow.device.index)
        if not instance.missing:
            self._ready(instance)

    def _ready(self, instance: Instance) -> None:
        if self.server_poll_s:
            since = self.events.now - instance.start
            polls = math.ceil(since / self.server_poll_s - 1e-9)
            self.after(polls * self.server_poll_s - since, lambda: self._noticed(instance))
        else:
            self._noticed(instance)

    def _noticed(self, instance: Instance) -> None:
        instance.loaded = True
        self.controller.loaded(instance)
        instance.ready()

    def stop(self, instance: Instance, *, drop: bool = False) -> None:
        """Stop an instance that is loaded and has no requests.

        Its weights stay and become evictable, or are dropped if ``drop`` is set.

        Raises
        ------
        ValueError
            If the instance has requests, is loading or has ended.
        """
        if instance.ended or instance.work or not instance.loaded:
            raise ValueError("cannot stop an instance that has work, is loading or has ended")
        self.events.cancel(instance)
        instance.ended = True
        self.instances[instance.model].remove(instance)
        self._set_kv(instance, 0.0)
        for rank, device in enumerate(instance.devices):
            device.instances.remove(instance)
            if not device.instances:
                self._count(device)
            shard = device.shards[instance.model, rank]
            shard.pinned = False
            if drop:
                self.keep(device, shard, 0)
        self.disturb(instance)

    def lend(self, instance: Instance, kv_bytes: float) -> None:
        """Shrink an instance's KV cache to ``kv_bytes`` on each device, rounded down to whole
        bytes. The rest becomes free for prewarming.

        Raises
        ------
        ValueError
            If the KV cache is smaller than that, or ``kv_bytes`` is negative.
        """
        if not 0 <= kv_bytes <= instance.kv_room:
            raise ValueError(
                f"cannot leave {kv_bytes:g} bytes of KV cache: must be in [0, {instance.kv_room:g}]"
            )
        self._set_kv(instance, float(math.floor(kv_bytes)))

    def reserve(self, instance: Instance, request: int) -> bool:
        """Return whether the instance has room for this request; grow an elastic KV cache."""
        if instance.work >= instance.profile.batch:
            return False
        tokens = instance.kv_tokens + self.tokens[request]
        need = float(tokens) * instance.profile.kv_token_bytes
        if need <= instance.kv_room:
            return True
        if not self.elastic_kv:
            return not instance.work  # serve a request that exceeds every cache alone, cut
        if self._grow_kv(instance, _steps(need)) or self._grow_kv(instance, need):
            return True
        alone = min(device.spare + device.kv for device in instance.devices)
        return not instance.work and need > alone

    def released(self, instance: Instance) -> None:
        """Shrink an elastic KV cache after the end of a request if much of it is unused, and free
        it after the last request."""
        if self.elastic_kv:
            need = _steps(float(instance.kv_tokens) * instance.profile.kv_token_bytes)
            if not need or instance.kv_room > need + KV_STEP:
                self._set_kv(instance, need)

    def idle(self, instance: Instance) -> None:
        self.controller.idle(instance)

    def slowdown(self, instance: Instance) -> float:
        """Return the current slowdown factor of the instance relative to running alone."""
        if self.partitioned:
            return float(max(len(device.instances) for device in instance.devices))
        beside = max(
            sum(other.working for other in device.instances if other is not instance)
            for device in instance.devices
        )
        return 1.0 + self.hardware.interference * beside

    def disturb(self, instance: Instance) -> None:
        """Tell the instances on the same devices that this one, or its work, starts or stops."""
        for other in {other: None for device in instance.devices for other in device.instances}:
            other.disturbed()

    def _count(self, device: Device) -> None:
        since = self.occupied_since[device.index]
        self.device_seconds += max(self.events.now - since, 0.0)


def _steps(nbytes: float) -> float:
    return math.ceil(nbytes / KV_STEP) * KV_STEP
