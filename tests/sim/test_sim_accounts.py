"""Risk: a simulated account does not add up: memory, bytes or requests appear from nothing."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_checks import Accounts, Scripted, run, tiny, workload

from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload import catalogue, workloads

# (e) Conservation under every policy.


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize(
    "hardware",
    [
        Hardware(8, 8, 40e9),
        Hardware(8, 4, 40e9, multipath=4, switch_devices=2, host_memory=60e9),
    ],
)
def test_accounts_balance_under_every_policy(policy: str, hardware: Hardware) -> None:
    models = catalogue.mixed(6)
    requests = workloads.power_law(models, 2.0, 60.0, 3)
    accounts = Accounts(capacity=not POLICIES[policy].unlimited_memory)
    fleet = simulate(policy, requests, hardware, observers=[accounts])
    accounts.close()
    assert accounts.events > len(requests.time)
    assert not any(fleet.instances[m][0].request_count for m in range(6) if fleet.instances[m])


# (e) Conservation under random operations.

SCALE = 10**7  # a KV cache grows in steps of a hundred of these
MODELS = tuple(
    replace(m, layer_bytes=tuple(SCALE * n for n in m.layer_bytes), kv_token_bytes=SCALE * k)
    for m, k in [(tiny(), 1), (tiny(2), 1), (tiny(layers=(90, 20, 60, 10)), 3), (tiny(4), 2)]
)
OPERATIONS = ("start", "stop", "drop", "drain", "prewarm", "load", "keep", "cancel", "lend", "host")


class RandomController(Scripted):
    """A controller that takes random actions and serves the requests that it can."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.rng = np.random.default_rng(seed)
        self.counts: dict[str, int] = {}

    def begin(self, fleet: Fleet) -> None:
        super().begin(fleet)
        fleet.after(0.0, self.act)

    def idle(self, instance: Any) -> None:
        if instance.draining or self.rng.random() < 0.2:
            self.fleet.stop(instance)

    def act(self) -> None:
        self.fleet.after(float(self.rng.exponential(0.4)), self.act)
        for _ in range(int(self.rng.integers(1, 3))):
            name = self.rng.choice(OPERATIONS)
            if getattr(self, name)():
                self.counts[name] = self.counts.get(name, 0) + 1
        for _, model in self.waiting:  # so that all are served in the end
            if not any(not i.draining for i in self.fleet.instances[model]):
                self.start(model)
        self.assign()

    def some(self, of: Any) -> Any:
        of = list(of)
        return of[self.rng.integers(len(of))] if of else None

    def shard(self) -> Any:
        device = self.some(self.fleet.devices)
        return device, self.some(s for s in device.shards.values() if not s.pinned)

    def target(self) -> tuple[Any, int, int, int]:
        model = int(self.rng.integers(len(MODELS)))
        rank = int(self.rng.integers(MODELS[model].width))
        return self.some(self.fleet.devices), model, rank, int(self.rng.integers(1, 5))

    def start(self, model: int | None = None) -> bool:
        model = int(self.rng.integers(len(MODELS))) if model is None else model
        width = MODELS[model].width
        node = self.some(self.fleet.links.nodes)
        if self.fleet.kv_caches.elastic and self.rng.random() < 0.5:
            free = [device for device in node if self.fleet.memory.fits(device, model)]
        else:
            free = [device for device in node if not device.instances]
        if len(free) < width:
            for instance in {each for device in node for each in device.instances}:
                instance.draining = instance.loaded  # requests may wait for a loading one
                if instance.loaded and not instance.request_count:
                    self.fleet.stop(instance)
            return False
        self.rng.shuffle(free)
        for idle in {i: None for d in free[:width] for i in d.instances if not i.active}:
            self.fleet.stop(idle)
        self.fleet.start(model, free[:width], drop_others=bool(self.rng.random() < 0.5))
        return True

    def stop(self, drop: bool = False) -> bool:
        instance = self.some(
            i for each in self.fleet.instances for i in each if i.loaded and not i.request_count
        )
        if instance:
            self.fleet.stop(instance, drop=drop)
        return instance is not None

    def drop(self) -> bool:
        return self.stop(True)

    def drain(self) -> bool:
        instance = self.some(i for each in self.fleet.instances for i in each if i.loaded)
        if instance:
            instance.draining = True
        return instance is not None

    def prewarm(self) -> bool:
        device, model, rank, layers = self.target()
        layers = min(layers, len(MODELS[model].layer_bytes))
        priority = float(self.rng.integers(4))
        return self.fleet.memory.prewarm(device, model, rank, layers, priority=priority)

    def load(self) -> bool:
        device, model, rank, layers = self.target()
        layers = min(layers, len(MODELS[model].layer_bytes))
        values = sorted(self.rng.integers(0, 9, 2).tolist(), reverse=True)
        ends = self.fleet.memory.ends[model]
        stamps = [(float(ends[layers // 2]), values[0]), (float(ends[-1]), values[1])]
        before = {s: s.target for s in device.shards.values()}
        loaded = self.fleet.memory.load(device, model, rank, layers, stamps)
        if not loaded:  # a refused load evicts nothing
            assert before == {s: s.target for s in device.shards.values()}
        return loaded

    def keep(self) -> bool:
        device, shard = self.shard()
        if shard:
            self.fleet.memory.keep(device, shard, int(self.rng.integers(0, 5)) % len(shard.ends))
        return shard is not None

    def cancel(self) -> bool:
        device, shard = self.shard()
        if shard:
            layers, wanted = shard.layers, int(self.rng.integers(0, 4))
            self.fleet.memory.cancel(device, shard, wanted)
            assert shard.layers == layers
        return shard is not None

    def host(self) -> bool:
        """Plan the host memory of a node."""
        links, node = self.fleet.links, int(self.rng.integers(len(self.fleet.links.nodes)))
        values = {
            model: self.rng.integers(0, 4, len(each.layer_bytes)).astype(float)
            for model, each in enumerate(MODELS)
            if self.rng.random() < 0.7
        }
        links.prefetches[node].want(links.host_memories[node].value(values))
        return True

    def lend(self) -> bool:
        instance = self.some(i for each in self.fleet.instances for i in each if i.loaded)
        if instance is None:
            return False
        used = instance.kv_tokens * instance.profile.kv_token_bytes
        if used < instance.kv_room:
            share = float(self.rng.random())
            self.fleet.kv_caches.lend(instance, used + share * (instance.kv_room - used))
        return used < instance.kv_room


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    elastic=st.booleans(),
    streaming=st.booleans(),
    memory=st.integers(330, 900),
    host=st.sampled_from([math.inf, 700.0, 0.0]),
    multipath=st.integers(1, 4),
    switch_devices=st.sampled_from([1, 2, 4]),
    share=st.sampled_from([0.0, 0.05, 0.5]),
)
def test_accounts_balance_under_random_operations(
    seed: int,
    elastic: bool,
    streaming: bool,
    memory: int,
    host: float,
    multipath: int,
    switch_devices: int,
    share: float,
) -> None:
    rng = np.random.default_rng(seed)
    whole = rng.integers((0, 1, 1), (len(MODELS), 40, 30), (40, 3)).tolist()
    times = sorted(rng.uniform(0, 30, 40).tolist())
    rows = [(time, *row) for time, row in zip(times, whole, strict=True)]
    hardware = Hardware(
        8, 4, SCALE * memory, 150.0 * SCALE, multipath, switch_devices, SCALE * host, 100.0 * SCALE,
        share,
    )  # fmt: skip
    controller = RandomController(seed)
    run(workload(MODELS, rows), hardware, controller, streaming=streaming, elastic_kv=elastic)


def test_the_random_controller_performs_every_operation() -> None:
    rows = [(float(i), i % 4, 20, 20) for i in range(40)]
    controller = RandomController(1)
    run(
        workload(MODELS, rows),
        Hardware(8, 4, 700.0 * SCALE, 150.0 * SCALE),
        controller,
        elastic_kv=True,
    )
    assert set(controller.counts) == set(OPERATIONS)


# (f) Repeatability.


@pytest.mark.parametrize("policy", list(POLICIES))
def test_the_same_seed_gives_identical_bytes(policy: str) -> None:
    def once() -> bytes:
        requests = workloads.power_law(catalogue.mixed(4), 1.0, 60.0, 7)
        fleet = simulate(policy, requests, Hardware(4, 4))
        numbers = [
            fleet.links.loaded_bytes,
            fleet.memory.wasted_bytes,
            fleet.device_seconds,
            float(fleet.starts),
        ]
        return fleet.first_token.tobytes() + fleet.finished.tobytes() + np.array(numbers).tobytes()

    assert once() == once()
