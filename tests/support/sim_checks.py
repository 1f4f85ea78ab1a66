"""Invariants of a simulated fleet, checked at every event, and small scripted workloads."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Device, Hardware, Shard
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance
from warmserve_rt.sim.core.links import Flow
from warmserve_rt.sim.workload.workloads import Workload

BYTE = 1.0  # tolerance of sums of byte counts


EIGHT = Hardware(devices=8, memory=72e9)
SMALL = ModelProfile("small", 1, (3, 5, 5, 5, 4), 2, 0.05, 0.001, 0.01, batch=4)


def tiny(width: int = 1, layers: tuple[int, ...] = (40, 70, 70, 70, 50), **more: Any) -> Any:
    """Return the profile of a model of a few hundred bytes."""
    values: dict[str, Any] = {"kv_token_bytes": 1, "batch": 4, "decode_request_s": 0.001, **more}
    return ModelProfile("tiny", width, layers, prefill_s=0.05, prefill_token_s=0.001,
                        decode_s=0.01, **values)  # fmt: skip


def workload(
    models: Sequence[ModelProfile], requests: Sequence[tuple[float, int, int, int]]
) -> Workload:
    """Return a workload of requests (time, model, prompt, output), ordered by time."""
    columns = list(zip(*requests, strict=True)) or [(), (), (), ()]
    return Workload(
        name="scripted",
        models=tuple(models),
        time=np.array(columns[0], np.float64),
        model=np.array(columns[1], np.int64),
        prompt=np.array(columns[2], np.int64),
        output=np.array(columns[3], np.int64),
        duration=max(columns[0], default=0.0) + 1.0,
        history_window=300.0,
        history=np.zeros((0, len(models))),
        service=np.ones(len(models)),
        dispersion=np.ones((0, len(models))),
    )


def toy(name: str, *, nbytes: int = 10, prefill: float = 0.2, batch: int = 32) -> ModelProfile:
    """Return a model of ``nbytes`` GB in ten layers."""
    layers = (nbytes * 10**8,) * 10
    return ModelProfile(name, 1, layers, 1000, prefill, 0.0, 0.01, batch=batch, ends=False)


def ttft(fleet: Fleet) -> np.ndarray[Any, Any]:
    """Return the seconds of each request until its first token."""
    return np.asarray(fleet.first_token - fleet.workload.time)


class Scripted:
    """A controller that runs scripted steps at given times.

    It gives each request to the first instance of its model that takes it.
    """

    def __init__(self, *steps: tuple[float, Callable[[Fleet], object]]) -> None:
        self.steps = steps
        self.waiting: list[tuple[int, int]] = []

    def begin(self, fleet: Fleet) -> None:
        self.fleet = fleet
        for time, step in self.steps:
            fleet.after(time - fleet.now, lambda step=step: step(fleet))  # type: ignore[misc]

    def arrived(self, request: int, model: int) -> None:
        self.waiting.append((request, model))
        self.assign()

    def prefilled(self, instance: Instance) -> None: ...

    def finished(self, instance: Instance, request: int) -> None:
        self.assign()

    def loaded(self, instance: Instance) -> None:
        self.assign()

    def idle(self, instance: Instance) -> None: ...

    def assign(self) -> None:
        left = []
        for request, model in self.waiting:
            for instance in self.fleet.instances[model]:
                open_ = instance.loaded and not instance.draining
                if open_ and self.fleet.kv_caches.reserve(instance, request):
                    instance.take(request)
                    break
            else:
                left.append((request, model))
        self.waiting = left


class Accounts:
    """An observer that checks a fleet after every event and keeps its own accounts."""

    def __init__(self, *, capacity: bool = True) -> None:
        self.capacity = capacity
        self.carried = 0.0  # bytes: the integral of the rates of all flows
        self.prefetched = 0.0  # bytes: the same for the prefetches of all nodes
        self.busy = 0.0  # device-seconds: the integral of devices that have an instance
        self.dropped = self.given = 0.0  # bytes evicted, and bytes that preload() made resident
        self.events = 0

    def __call__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        real = fleet.clock.run
        controller = fleet.controller

        def run(until: float) -> None:
            """Run one due event at a time and check the fleet after each."""
            heap = fleet.clock._heap
            while heap and heap[0][0] < until:
                self.passes(fleet.clock.now, heap[0][0])
                real(math.nextafter(heap[0][0], math.inf))
                self.check()
            self.passes(fleet.clock.now, until)
            real(until)

        def arrived(request: int, model: int) -> None:
            told(request, model)
            self.check()

        def keep(device: Device, shard: Shard, layers: int) -> None:
            before = shard.resident_now
            dropping(device, shard, layers)
            self.dropped += before - shard.resident_now

        def preload(device: Device, model: int, rank: int) -> None:
            there = device.shards.get((model, rank))
            before = there.resident_now if there else 0.0
            preloading(device, model, rank)
            self.given += device.shards[model, rank].resident - before

        dropping, preloading, told = fleet.memory.keep, fleet.memory.preload, controller.arrived
        fleet.memory.keep, fleet.memory.preload = keep, preload  # type: ignore[method-assign]
        fleet.clock.run = run  # type: ignore[method-assign]
        controller.arrived = arrived  # type: ignore[method-assign]

    def passes(self, now: float, then: float) -> None:
        if then <= now:
            return
        for device in self.fleet.devices:
            for flow in flows(device):
                self.carried += flow.rate * (then - now)
            if device.instances:  # device-seconds count from time 0 on
                self.busy += max(then, 0.0) - max(now, 0.0)
        for prefetch in self.fleet.links.prefetches:
            self.prefetched += prefetch.rate * (then - now)

    def check(self) -> None:
        self.events += 1
        for device in self.fleet.devices:
            self.check_device(device)
        for node in self.fleet.links.nodes:
            self.check_links(node)
        for host in self.fleet.links.host_memories:
            assert 0 <= host.held_bytes <= host.capacity
        for model, instances in enumerate(self.fleet.instances):
            for instance in instances:
                assert instance.model == model
                assert all(
                    instance in device.instances for device in self.fleet.devices_of(instance)
                )
                assert 0 <= instance.request_count <= instance.profile.batch
                assert instance.slowdown == self.fleet.interference.slowdown(instance)
                assert instance.computing == (instance.prefilling >= 0 or bool(instance.decoding))
                assert (instance.kv_tokens == 0) == (instance.request_count == 0)
                assert instance.queued_prefill_s >= -1e-9
                if instance.loaded:
                    for rank, device in enumerate(self.fleet.devices_of(instance)):
                        shard = device.shards[model, rank]
                        assert shard.resident == shard.target == shard.ends[-1]

    def check_device(self, device: Device) -> None:
        hardware = self.fleet.hardware
        if self.capacity:
            assert device.used <= hardware.memory + BYTE
        targets = sum(shard.target for shard in device.shards.values())
        assert abs(device.used - targets - device.kv) <= BYTE
        assert device.kv == sum(instance.kv_room for instance in device.instances)
        assert all(instance.kv_room >= 0 for instance in device.instances)
        assert self.fleet.kv_caches.elastic or len(device.instances) <= 1
        assert bool(device.instances) == any(s.pinned for s in device.shards.values())
        assert self.fleet.memory.wasted_bytes >= 0
        for (model, rank), shard in device.shards.items():
            assert (shard.model, shard.rank) == (model, rank)
            assert 0 <= shard.resident <= shard.resident_now <= shard.target + 1e-3
            assert shard.target in shard.ends
            assert 0 <= shard.unused <= shard.resident + 1e-3
            used = [
                user
                for user in device.instances
                if (model, rank) == (user.model, user.device_indices.index(device.index))
            ]
            assert shard.pinned == (len(used) == 1)
            assert not (used and shard.unused)
            if shard.flow is None:
                # Missing bytes have a flow, except in the delay before an instance starts to load.
                assert shard.resident == shard.target or (used and not used[0].layer_arrivals)
            else:
                assert shard.flow.shard is shard
                assert shard.flow in flows(device)
        assert len({id(flow.shard) for flow in flows(device)}) == len(flows(device))
        for flow in flows(device):
            assert device.shards[flow.shard.model, flow.shard.rank].flow is flow
            assert flow.foreground == (flow in device.foreground)
            assert not flow.foreground or flow.shard.pinned
        priorities = [flow.priority for flow in device.background]
        assert priorities == sorted(priorities, reverse=True)
        assert all(flow.rate == 0 for flow in device.background[1:] + device.foreground[1:])

    def check_links(self, node: Sequence[Device]) -> None:
        hardware = self.fleet.hardware
        links = hardware.bandwidth * len(node) / hardware.switch_devices
        share, size = hardware.background_share, hardware.switch_devices
        rate = {flow: flow.rate for device in node for flow in flows(device)}
        near = 1 + 1e-9
        assert sum(rate.values()) <= links * near
        disk = [r for flow, r in rate.items() if flow.from_disk]
        prefetch = self.fleet.links.prefetches[node[0].node]
        assert sum(disk) + prefetch.rate <= hardware.disk_bandwidth * near
        urgent = any(device.foreground for device in node)
        for first in range(0, len(node), size):
            group = node[first : first + size]
            ahead = [d.foreground[0] for d in group if d.foreground]
            behind = [d.background[0] for d in group if d.background]
            for flow in ahead:
                assert 0 < flow.rate <= hardware.bandwidth * hardware.multipath * near
            least = hardware.bandwidth * (share if urgent else 1.0)
            if behind and not any(flow.from_disk for flow in behind):
                assert sum(flow.rate for flow in behind) >= least / near
            if ahead and behind:
                assert sum(flow.rate for flow in behind) <= least * near
            if not ahead:
                assert sum(flow.rate for flow in behind) <= hardware.bandwidth * near

    def close(self) -> None:
        """Check the totals at the end of the run."""
        fleet, requests = self.fleet, self.fleet.workload
        served = ~fleet.refused
        assert (np.isfinite(fleet.first_token) == served).all()
        assert (np.isfinite(fleet.finished) == served).all()
        wait = fleet.first_token - requests.time
        models = [fleet.profiles[model] for model in fleet.requests.model]
        least = [m.prefill(p) for m, p in zip(models, fleet.requests.prompt, strict=True)]
        assert (wait >= np.array(least) - 1e-9)[served].all()
        decode = np.array([m.decode(1) for m in models])
        # The fluid model counts a token as done 1e-6 of a step early.
        decoding = (requests.output - 1 - 1e-5) * decode - 1e-9
        assert (fleet.finished - fleet.first_token >= decoding)[served].all()
        assert math.isclose(
            fleet.links.loaded_bytes, self.carried, rel_tol=1e-9, abs_tol=100 * BYTE
        )
        for prefetch in fleet.links.prefetches:
            prefetch.accrue()
        prefetched = sum(prefetch.loaded_bytes for prefetch in fleet.links.prefetches)
        assert math.isclose(prefetched, self.prefetched, rel_tol=1e-9, abs_tol=100 * BYTE)
        for host in fleet.links.host_memories:
            held = [
                each.layer_bytes[layer]
                for model, each in enumerate(fleet.profiles)
                for rank in range(each.width)
                for layer in range(len(each.layer_bytes))
                if not host.infinite and host.holds(model, rank, layer)
            ]
            assert sum(held) == host.held_bytes
        assert math.isclose(fleet.device_seconds, self.busy, rel_tol=1e-9, abs_tol=1e-6)
        came = fleet.links.loaded_bytes + self.given
        there = sum(s.resident for d in fleet.devices for s in d.shards.values())
        assert math.isclose(came, there + self.dropped, rel_tol=1e-9, abs_tol=100 * BYTE)
        assert fleet.memory.wasted_bytes <= fleet.links.loaded_bytes + BYTE


def flows(device: Device) -> list[Flow]:
    return [*device.foreground, *device.background]


def run(
    requests: Workload,
    hardware: Hardware,
    controller: Any,
    observe: bool = True,
    **arguments: Any,
) -> tuple[Fleet, Accounts]:
    """Run a fleet, checking its accounts at every event, and return both."""
    fleet = Fleet(requests, hardware, controller, **arguments)
    accounts = Accounts()
    if observe:
        accounts(fleet)
    fleet.run()
    if observe:
        accounts.close()
    return fleet, accounts
