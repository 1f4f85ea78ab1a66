"""Risk: a baseline is weaker, or stronger, than the system it stands for."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_checks import EIGHT, toy, ttft, workload

from warmserve_rt.policy.pipeline import first_token
from warmserve_rt.sim.controllers.baselines.warmserve import Replica
from warmserve_rt.sim.controllers.policies import POLICIES
from warmserve_rt.sim.core import clock
from warmserve_rt.sim.core.devices import Device, Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.instance import Instance
from warmserve_rt.sim.study.metrics import prefills
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload.catalogue import MODELS, mixed
from warmserve_rt.sim.workload.workloads import Workload, power_law


@pytest.fixture(scope="module")
def small() -> Workload:
    return power_law(mixed(8), 0.6, 120, 1)


# All policies.


@pytest.mark.parametrize("policy", list(POLICIES))
def test_every_request_is_served_once(
    policy: str, small: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken, finished = Counter[int](), Counter[int]()
    take, finish = Instance.take, Instance._finish

    def counted_take(self: Instance, request: int) -> None:
        taken[request] += 1
        assert self.model == small.model[request]
        take(self, request)

    def counted_finish(self: Instance, request: int) -> None:
        finished[request] += 1
        finish(self, request)

    monkeypatch.setattr(Instance, "take", counted_take)
    monkeypatch.setattr(Instance, "_finish", counted_finish)
    fleet = simulate(policy, small, EIGHT)
    once = dict.fromkeys(range(len(small.time)), 1)
    assert dict(taken) == dict(finished) == once
    assert (ttft(fleet) >= prefills(small) - 1e-9).all()
    assert (fleet.finished >= fleet.first_token).all()
    assert not fleet.refused.any()


@pytest.mark.parametrize("policy", [name for name, p in POLICIES.items() if not p.unlimited_memory])
def test_memory_is_within_its_bounds_after_each_event(
    policy: str, small: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleets: list[Fleet] = []
    pop, checked = clock.heappop, 0

    def checked_pop(heap: Any) -> Any:
        nonlocal checked
        for device in fleets[0].devices:
            used = device.kv + sum(shard.target for shard in device.shards.values())
            assert device.used == pytest.approx(used)
            assert device.used <= EIGHT.memory * (1 + 1e-9)
        checked += 1
        return pop(heap)

    monkeypatch.setattr(clock, "heappop", checked_pop)
    simulate(policy, small, EIGHT, observers=[fleets.append])
    assert checked > 2 * len(small.time)


def test_prewarming_shortens_starts_more_than_other_techniques() -> None:
    load = power_law(mixed(8), 0.2, 300, 1)
    order = ("autoscaling", "blitzscale", "lru", "warmserve", "h0")
    means = [ttft(simulate(p, load, EIGHT, engine_start_s=0.0)).mean() for p in order]
    assert means == sorted(means, reverse=True)
    assert means[0] > 5 * means[3]


def test_an_unknown_policy_option_is_refused(small: Workload) -> None:
    with pytest.raises(TypeError, match="objective"):
        simulate("lru", small, EIGHT, policy_options={"objective": 0.5})


# When instances start.


@pytest.mark.parametrize("policy", ["autoscaling", "blitzscale", "lru", "warmserve", "h0"])
@pytest.mark.parametrize(
    ("scaling", "second"),
    [
        ({}, 4.5),
        ({"scale_up_threshold": 0.5, "scale_down_threshold": 0.3, "load_window_s": 1.0}, 1.0),
    ],
)
def test_an_instance_starts_when_the_average_load_exceeds_the_threshold(
    policy: str, scaling: dict[str, float], second: float
) -> None:
    """From 0.25 s on, an instance has all the work that it takes; the check runs twice a second."""
    rows = [(0.25, 0, 9, 2000)] * 4
    instances = []

    def look(fleet: Fleet) -> None:
        for at in (second - 0.01, second + 0.01):
            fleet.after(at, lambda: instances.append(len(fleet.instances[0])))

    load = workload([toy("a", batch=4)], rows)
    simulate(policy, load, EIGHT, policy_options=scaling, observers=[look])
    assert instances == [1, 2]


@pytest.mark.parametrize(
    "scaling",
    [
        {"scale_up_threshold": 0.4},
        {"scale_down_threshold": 0.0},
        {"scale_up_threshold": float("nan")},
        {"load_window_s": 0.0},
        {"load_window_s": -1.0},
    ],
)
def test_invalid_scaling_options_are_refused(small: Workload, scaling: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"of capacity|seconds"):
        simulate("warmserve", small, EIGHT, policy_options=scaling)


# Cold starts and polls.


@pytest.mark.parametrize(("base", "seconds"), [("llama2-7b", 0.392), ("llama2-70b", 1.004)])
def test_a_cold_start_takes_its_load_time_and_polling_adds_its_delays(
    base: str, seconds: float
) -> None:
    model = MODELS[base]
    hardware = Hardware(bandwidth=32 * 2**30)
    load = workload([model], [(10.1, 0, 512, 2)])

    def cold(policy: str) -> float:
        fleet = simulate(policy, load, hardware, switch_s=0.0, engine_start_s=0.0)
        return float(ttft(fleet)[0]) - model.prefill(512)

    assert cold("autoscaling") == pytest.approx(seconds, abs=5e-4)
    # The control loop runs 0.4 s later. Requests poll once a second, so their wait is rounded up.
    ready = 0.4 + 0.01 + seconds
    assert cold("autoscaling-polls") == pytest.approx(np.ceil(ready))


@pytest.mark.parametrize("policy", ["autoscaling", "warmserve"])
@given(time=st.floats(0, 3), engine=st.sampled_from([0.0, 0.03, 2.0]))
@settings(max_examples=12, deadline=None)
def test_polling_delays_a_request_by_at_most_one_period_of_each_loop(
    policy: str, time: float, engine: float
) -> None:
    load = workload([toy("a")], [(time, 0, 100, 5)])

    def run(name: str) -> float:
        return float(ttft(simulate(name, load, EIGHT, engine_start_s=engine))[0])

    prompt, polled = run(policy), run(f"{policy}-polls")
    assert prompt <= polled + 1e-9
    assert polled <= prompt + 0.5 + 0.01 + 0.05 + 1.0 + 1e-9


@given(prefill=st.floats(0.001, 2.0), gigabytes=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_serving_while_loading_matches_the_layer_pipeline(prefill: float, gigabytes: int) -> None:
    model = toy("a", nbytes=gigabytes, prefill=prefill)
    fleet = simulate("blitzscale", workload([model], [(1.0, 0, 100, 2)]), EIGHT, switch_s=0.0)
    loads = [nbytes / EIGHT.bandwidth for nbytes in model.layer_bytes]
    assert ttft(fleet)[0] == pytest.approx(first_token(loads, model.compute(prefill), 0))


# Least recently used.


def test_the_least_recently_used_model_is_evicted() -> None:
    hardware = Hardware(devices=1, node_devices=1, memory=25e9, bandwidth=10e9)
    models = [toy(name) for name in "abc"]
    turns = "abacabab"
    rows = [(20.0 * i, "abc".index(name), 9, 9) for i, name in enumerate(turns)]
    fleet = simulate("lru", workload(models, rows), hardware)
    warm = models[0].prefill(9) + 0.01
    # c evicts b, and b evicts c: a was used after each of them.
    expected = [warm + (0.0 if hit == "+" else 1.0) for hit in "--+-+-++"]
    assert ttft(fleet) == pytest.approx(expected)


def test_an_evicted_model_leaves_all_its_devices() -> None:
    wide = MODELS["llama2-70b"]  # 34.5 GB on each of four
    hardware = Hardware(devices=4, node_devices=4, memory=40e9)
    models = [wide, toy("a")]
    rows = [(0.0, 0, 9, 9), (30.0, 1, 9, 9), (60.0, 0, 9, 9)]
    seen: list[int] = []

    def watch(fleet: Fleet) -> None:
        for at in (20.0, 40.0):
            fleet.clock.after(
                at - fleet.now, lambda: seen.append(sum(len(d.shards) for d in fleet.devices))
            )

    fleet = simulate("lru", workload(models, rows), hardware, observers=[watch])
    assert seen == [4, 1]
    assert ttft(fleet)[2] == pytest.approx(ttft(fleet)[0])


# WarmServe.


def test_overlapping_groups_nest_only_if_one_contains_the_other() -> None:
    a, b, c = (Device(i, 0, 1.0) for i in range(3))
    replica = Replica(0, (a, b), 1.0)
    assert all(replica.nests(group) for group in [(a,), (b, a), (a, b, c), (c,)])
    assert not replica.nests((b, c))


def test_a_replica_is_placed_on_nesting_devices_and_aligned_groups_first() -> None:
    wide = MODELS["llama2-70b"]
    fleet = Fleet(workload([toy("a"), wide], [(1e6, 0, 1, 1)]), EIGHT, POLICIES["warmserve"].make())
    warmserve: Any = fleet.controller
    warmserve.begin(fleet)

    def place(busy: int) -> list[int] | None:
        if busy >= 0:
            fleet.start(0, [fleet.devices[busy]])
        group = warmserve.group_for(Replica(1, (), 1.0))
        return group and [device.index for device in group]

    assert [place(busy) for busy in (-1, 1)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert place(6) == [0, 2, 3, 4]
    warmserve.replicas = [Replica(0, (fleet.devices[2], fleet.devices[5]), 0.5)]
    assert place(-1) == [0, 3, 4, 7]
    assert place(0) == [2, 3, 4, 5]  # with only 2 or only 5 it would cross the replica
    assert place(5) is None


def test_a_draining_instance_keeps_cache_in_proportion_to_its_requests() -> None:
    model = toy("a", nbytes=12)
    fleet = Fleet(workload([model], [(1e6, 0, 1, 1)]), EIGHT, POLICIES["warmserve"].make())
    warmserve: Any = fleet.controller
    warmserve.begin(fleet)
    instance = fleet.start(0, fleet.devices[:1], drop_others=True)
    assert instance.kv_room == 60e9
    instance.draining = True
    for work, kept in ((32, 1.0), (16, 0.5), (4, 0.125), (0, 0.0)):
        instance.request_count = work
        (warmserve.drain if work == 32 else warmserve.lend)(instance)
        assert instance.kv_room == 60e9 * kept
        assert fleet.devices[0].used == 12e9 + 60e9 * kept
