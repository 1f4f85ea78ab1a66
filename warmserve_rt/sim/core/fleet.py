"""The simulated fleet: the state and the operations of a controller, and the results of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.workload.workloads import Workload

from .clock import Clock
from .devices import Device, Hardware, make_devices
from .instance import Instance
from .interference import Interference
from .kv_cache import KvCaches
from .links import Links
from .memory import Memory
from .requests import Requests
from .startup import StartDelays, Startup

LEAD_S = 60.0  # seconds before the first request, in which layers can be loaded


class Controller(Protocol):
    """The policy of a fleet. Each method is called after its event has happened."""

    def begin(self, fleet: Fleet) -> None: ...
    def arrived(self, request: int, model: int) -> None: ...
    def prefilled(self, instance: Instance) -> None: ...
    def finished(self, instance: Instance, request: int) -> None: ...
    def loaded(self, instance: Instance) -> None: ...
    def idle(self, instance: Instance) -> None: ...


class Fleet:
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

    Attributes
    ----------
    memory, links, kv_caches, interference
        Its parts: the memory of the devices, their loads, the KV caches of the instances, and their
        effect on each other.
    instances
        The instances of each model.
    first_token, finished
        The times of each request's first and last token; NaN until then.
    refused
        Whether the controller refused each request.
    device_seconds
        Seconds of devices with an instance, from the first request on.
    starts, start_layers, start_hits
        The starts, the layers that they needed, and those of them that were resident.

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
        self.workload, self.hardware, self.controller = workload, hardware, controller
        self.profiles: Sequence[ModelProfile] = workload.models
        self.switch_s, self.streaming = switch_s, streaming
        self.bandwidth = hardware.bandwidth * (1 - hardware.background_share)
        self.node_devices = hardware.node_devices
        self.clock = Clock()
        self.requests = Requests.of(workload)
        self.devices = make_devices(hardware)
        self.links = Links(self.clock, hardware, self.devices, self.profiles)
        self.memory = Memory(self.profiles, self.devices, self.links)
        self.kv_caches = KvCaches(self.memory, self.requests, elastic=elastic_kv)
        self.interference = Interference(
            self.devices, hardware.interference, partitioned=partitioned
        )
        delays = StartDelays(switch_s, engine_start_s, server_poll_s, mapping_poll_s)
        self._startup = Startup(self.clock, self.devices, self.links, delays, self.on_loaded)
        self.first_token = np.full(len(workload.time), np.nan)
        self.finished = np.full(len(workload.time), np.nan)
        self.refused = np.zeros(len(workload.time), bool)
        self.instances: list[list[Instance]] = [[] for _ in self.profiles]
        self.device_seconds = 0.0
        self.occupied_since = [0.0] * hardware.devices
        self.starts = self.start_layers = self.start_hits = 0

    def run(self) -> None:
        """Run until every request is served or refused. Raise RuntimeError if some never are."""
        clock, arrived = self.clock, self.controller.arrived
        clock.now = -LEAD_S
        self.controller.begin(self)
        for request, (time, model) in enumerate(
            zip(self.requests.time, self.requests.model, strict=True)
        ):
            clock.run(time)
            arrived(request, model)
        # The events of a controller that polls never end.
        deadline = clock.now + 3600.0
        while (np.isnan(self.finished) & ~self.refused).any():
            clock.run(clock.now + 10.0)
            if clock.now > deadline:
                left = int((np.isnan(self.finished) & ~self.refused).sum())
                raise RuntimeError(
                    f"{left} requests were not served an hour after the last arrived"
                )
        for device in self.devices:
            if device.instances:
                self._add_device_seconds(device)
        self.memory.close()

    @property
    def now(self) -> float:
        return self.clock.now

    def after(self, seconds: float, call: Callable[[], None]) -> None:
        self.clock.after(seconds, call)

    def devices_of(self, instance: Instance) -> tuple[Device, ...]:
        """Return the devices of an instance, in the order of their ranks."""
        return tuple(self.devices[index] for index in instance.device_indices)

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
        profile = self.profiles[model]
        instance = Instance(
            self,
            self.clock,
            self.requests,
            model=model,
            profile=profile,
            device_indices=tuple(device.index for device in devices),
            streaming=self.streaming,
        )
        self.instances[model].append(instance)
        self.starts += 1
        for rank, device in enumerate(devices):
            if not device.instances:
                self.occupied_since[device.index] = max(self.clock.now, 0.0)
            device.instances.append(instance)
            self.start_layers += len(profile.layer_bytes)
            self.start_hits += self.memory.pin(device, model, rank, drop_others=drop_others)
        self.kv_caches.open(instance)
        self.interference.notify_neighbours(instance)
        self._startup.begin(instance)
        return instance

    def stop(self, instance: Instance, *, drop: bool = False) -> None:
        """Stop an instance that is loaded and has no requests.

        Parameters
        ----------
        instance
            The instance.
        drop
            Whether to drop its weights. Otherwise they stay and become evictable.

        Raises
        ------
        ValueError
            If the instance has requests, is loading or has ended.
        """
        if instance.ended or instance.request_count or not instance.loaded:
            raise ValueError("cannot stop an instance that has work, is loading or has ended")
        self.clock.cancel(instance)
        instance.ended = True
        self.instances[instance.model].remove(instance)
        self.kv_caches.close(instance)
        for rank, device in enumerate(self.devices_of(instance)):
            device.instances.remove(instance)
            if not device.instances:
                self._add_device_seconds(device)
            self.memory.unpin(device, instance.model, rank, drop=drop)
        self.interference.notify_neighbours(instance)

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
        others = [each for device in devices for each in device.instances]
        if any(not self.kv_caches.elastic or each.model == model for each in others):
            raise ValueError(f"devices {indices} must be free, but one has an instance")
        if any(device.spare < profile.nbytes for device in devices):
            raise ValueError(f"{profile.name} is larger than the free memory of devices {indices}")

    # Called at the end of a start, and by instances; see Owner.

    def on_loaded(self, instance: Instance) -> None:
        self.controller.loaded(instance)

    def on_first_token(self, instance: Instance, request: int) -> None:
        self.first_token[request] = self.clock.now
        self.controller.prefilled(instance)

    def on_finished(self, instance: Instance, request: int) -> None:
        self.finished[request] = self.clock.now
        self.kv_caches.shrink(instance)
        self.controller.finished(instance, request)

    def on_computing(self, instance: Instance) -> None:
        self.interference.notify_neighbours(instance)

    def on_idle(self, instance: Instance) -> None:
        self.controller.idle(instance)

    def _add_device_seconds(self, device: Device) -> None:
        since = self.occupied_since[device.index]
        self.device_seconds += max(self.clock.now - since, 0.0)
