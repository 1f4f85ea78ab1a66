"""Risk: a baseline is weaker, or stronger, than the system it stands for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.policy.pipeline import first_token
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.controllers.baselines.balance import KV_TOKENS, ModelLoad, place_copies
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

EIGHT = Hardware(devices=8, memory=72e9)
STATIC = ("sharing", "fixed-shares")


@pytest.fixture(scope="module")
def small() -> Workload:
    return power_law(mixed(8), 0.6, 120, 1)


def requests(models: Sequence[ModelProfile], rows: Sequence[tuple[float, int, int, int]]) -> Any:
    """Return a workload of (time, model, prompt, output) rows, without history."""
    time, model, prompt, output = zip(*rows, strict=True)
    return Workload(
        name="some",
        models=tuple(models),
        time=np.array(time, float),
        model=np.array(model, np.int32),
        prompt=np.array(prompt, np.int32),
        output=np.array(output, np.int32),
        duration=time[-1] + 1.0,
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
    return np.asarray(fleet.first_token - fleet.workload.time)


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


def test_prewarming_is_worth_far_more_than_whatever_else_quickens_a_start() -> None:
    workload = power_law(mixed(8), 0.2, 300, 1)
    order = ("autoscaling", "blitzscale", "lru", "warmserve", "h0")
    means = [ttft(simulate(p, workload, EIGHT, engine_start_s=0.0)).mean() for p in order]
    assert means == sorted(means, reverse=True)
    assert means[0] > 5 * means[3]


def test_options_a_policy_does_not_have_are_refused(small: Workload) -> None:
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
def test_another_instance_starts_once_load_has_been_high_for_long_enough(
    policy: str, scaling: dict[str, float], second: float
) -> None:
    """From 0.25 s on, an instance has all the work that it takes; the check runs twice a second."""
    rows = [(0.25, 0, 9, 2000)] * 4
    instances = []

    def look(fleet: Fleet) -> None:
        for at in (second - 0.01, second + 0.01):
            fleet.after(at, lambda: instances.append(len(fleet.instances[0])))

    workload = requests([toy("a", batch=4)], rows)
    simulate(policy, workload, EIGHT, policy_options=scaling, observers=[look])
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
def test_scaling_that_makes_no_sense_is_refused(small: Workload, scaling: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"of capacity|seconds"):
        simulate("warmserve", small, EIGHT, policy_options=scaling)


# Cold starts and polls.


@pytest.mark.parametrize(("base", "seconds"), [("llama2-7b", 0.392), ("llama2-70b", 1.004)])
def test_a_cold_start_takes_what_its_bytes_take_and_polls_no_less(
    base: str, seconds: float
) -> None:
    model = MODELS[base]
    hardware = Hardware(bandwidth=32 * 2**30)
    workload = requests([model], [(10.1, 0, 512, 2)])

    def cold(policy: str) -> float:
        fleet = simulate(policy, workload, hardware, switch_s=0.0, engine_start_s=0.0)
        return float(ttft(fleet)[0]) - model.prefill(512)

    assert cold("autoscaling") == pytest.approx(seconds, abs=5e-4)
    # The control loop runs 0.4 s later. Requests poll once a second, so their wait is rounded up.
    ready = 0.4 + 0.01 + seconds
    assert cold("autoscaling-polls") == pytest.approx(np.ceil(ready))


@pytest.mark.parametrize("policy", ["autoscaling", "warmserve"])
@given(time=st.floats(0, 3), engine=st.sampled_from([0.0, 0.03, 2.0]))
@settings(max_examples=12, deadline=None)
def test_polls_never_help_a_request_and_cost_each_loop_once(
    policy: str, time: float, engine: float
) -> None:
    workload = requests([toy("a")], [(time, 0, 100, 5)])

    def run(name: str) -> float:
        return float(ttft(simulate(name, workload, EIGHT, engine_start_s=engine))[0])

    prompt, polled = run(policy), run(f"{policy}-polls")
    assert prompt <= polled + 1e-9
    assert polled <= prompt + 0.5 + 0.01 + 0.05 + 1.0 + 1e-9


@given(prefill=st.floats(0.001, 2.0), gigabytes=st.integers(1, 60))
@settings(max_examples=25, deadline=None)
def test_serving_while_loading_is_the_pipeline_of_layers(prefill: float, gigabytes: int) -> None:
    model = toy("a", nbytes=gigabytes, prefill=prefill)
    fleet = simulate("blitzscale", requests([model], [(1.0, 0, 100, 2)]), EIGHT, switch_s=0.0)
    loads = [nbytes / EIGHT.bandwidth for nbytes in model.layer_bytes]
    assert ttft(fleet)[0] == pytest.approx(first_token(loads, model.compute(prefill), 0))


# Least recently used.


def test_what_was_used_lately_is_kept() -> None:
    hardware = Hardware(devices=1, node_devices=1, memory=25e9, bandwidth=10e9)
    models = [toy(name) for name in "abc"]
    turns = "abacabab"
    rows = [(20.0 * i, "abc".index(name), 9, 9) for i, name in enumerate(turns)]
    fleet = simulate("lru", requests(models, rows), hardware)
    warm = models[0].prefill(9) + 0.01
    # c evicts b, and b evicts c: a was used after each of them.
    expected = [warm + (0.0 if hit == "+" else 1.0) for hit in "--+-+-++"]
    assert ttft(fleet) == pytest.approx(expected)


def test_what_must_go_goes_whole_and_from_all_its_devices() -> None:
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

    fleet = simulate("lru", requests(models, rows), hardware, observers=[watch])
    assert seen == [4, 1]
    assert ttft(fleet)[2] == pytest.approx(ttft(fleet)[0])


# Static sharing.


@pytest.mark.parametrize("interference", [0.0, 0.35, 1.0])
def test_neighbours_slow_each_other_while_both_work(interference: float) -> None:
    one = Hardware(devices=1, node_devices=1, interference=interference)
    models = [toy("a"), toy("b")]

    def run(*rows: tuple[float, int, int, int]) -> Any:
        return ttft(simulate("sharing", requests(models, rows), one))

    assert run((0.0, 0, 9, 1)) == pytest.approx([0.2])
    assert run((0.0, 0, 9, 1), (0.0, 1, 9, 1)) == pytest.approx([0.2 * (1 + interference)] * 2)
    # The second arrives when the first is half done, and runs its own last half alone.
    both = 0.1 + 0.1 * (1 + interference)
    assert run((0.0, 0, 9, 1), (0.1, 1, 9, 1)) == pytest.approx([both] * 2)


def test_decoding_is_slowed_too() -> None:
    one = Hardware(devices=1, node_devices=1, interference=1.0)
    workload = requests([toy("a"), toy("b")], [(0.0, 0, 9, 101), (0.5, 1, 9, 1)])
    fleet = simulate("sharing", workload, one)
    # 0.2 s of prefill and 1 s of decoding; for 0.4 s, beside a prefill, decoding was half as fast.
    assert fleet.finished[0] == pytest.approx(0.2 + 1.0 + 0.2)


def test_fixed_shares_are_slow_with_nobody_beside_them() -> None:
    one = Hardware(devices=1, node_devices=1)
    models = [toy("a"), toy("b"), toy("c")]
    fleet = simulate("fixed-shares", requests(models, [(0.0, 0, 9, 3)]), one)
    assert ttft(fleet) == pytest.approx([0.6])
    assert fleet.finished[0] == pytest.approx(0.6 + 2 * 0.03)


def test_more_interference_is_slower(small: Workload) -> None:
    means = [
        ttft(simulate("sharing", small, replace(EIGHT, interference=x))).mean()
        for x in (0.0, 0.35, 1.0)
    ]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("policy", STATIC)
def test_models_without_a_place_are_refused_and_the_run_ends(policy: str) -> None:
    models = [toy("a", nbytes=30), toy("b", nbytes=30), toy("c", nbytes=30)]
    one = Hardware(devices=1, node_devices=1, memory=70e9)
    rows = [(float(i), i % 3, 9, 9) for i in range(9)]
    fleet = simulate(policy, requests(models, rows), one)
    assert fleet.refused.sum() == 3
    assert (np.isnan(fleet.first_token) == fleet.refused).all()
    assert fleet.now < 60


@pytest.mark.parametrize("policy", STATIC)
def test_a_cache_is_for_whoever_asks_and_waits_for_room(policy: str) -> None:
    """One request fills the device's cache; a request of the other model waits until it is done.

    A request that is larger than the cache is still served.
    """
    models = [toy("a"), toy("b")]
    one = Hardware(devices=1, node_devices=1, memory=20e9 + 3e6)  # 3,000 tokens
    rows = [(0.0, 0, 2000, 500), (0.1, 1, 1000, 10), (60.0, 1, 5000, 10)]
    fleet = simulate(policy, requests(models, rows), one)
    slow = 2.0 if policy == "fixed-shares" else 1.0
    assert fleet.first_token[1] == pytest.approx(fleet.finished[0] + 0.2 * slow)
    assert ttft(fleet)[2] == pytest.approx(0.2 * slow)


LOADS = st.lists(
    st.builds(
        lambda width, nbytes, load, burst: ModelLoad(
            ModelProfile("m", width, (nbytes * 10**9,), 10**5, 0.1, 0.0, 0.01, ends=False),
            load,
            load * burst,
            load,
        ),
        st.sampled_from([1, 2, 4]),
        st.integers(1, 60),
        st.floats(0, 100),
        st.floats(1, 5),
    ),
    min_size=1,
    max_size=20,
)


@given(loads=LOADS)
@settings(max_examples=100, deadline=None)
def test_a_placement_fits_and_leaves_out_only_what_does_not(loads: list[ModelLoad]) -> None:
    placed = place_copies(loads, EIGHT)
    on: list[list[int]] = [[] for _ in range(EIGHT.devices)]
    for each in placed:
        assert each.width == loads[each.model].profile.width
        assert each.first % each.width == 0
        for device in range(each.first, each.first + each.width):
            on[device].append(each.model)

    def bytes_of(model: int) -> float:
        profile = loads[model].profile
        return profile.nbytes + KV_TOKENS * profile.kv_token_bytes

    used = [sum(map(bytes_of, models)) for models in on]
    assert all(len(set(models)) == len(models) for models in on)
    assert max(used) <= EIGHT.memory
    for model in set(range(len(loads))) - {each.model for each in placed}:
        width = loads[model].profile.width
        groups = [used[i : i + width] for i in range(0, EIGHT.devices, width)]
        copies = Counter(each.model for each in placed)
        if max(copies.values(), default=0) <= 1:  # later copies may have taken the room
            assert all(max(group) + bytes_of(model) > EIGHT.memory for group in groups)


def test_copies_go_to_the_model_that_is_fullest() -> None:
    profile = toy("a")
    loads = [ModelLoad(profile, 60.0, 90.0, 9.0), ModelLoad(profile, 5.0, 10.0, 1.0)]
    copies = Counter(each.model for each in place_copies(loads, EIGHT))
    assert copies == {0: 6, 1: 1}


def test_a_large_model_that_few_want_does_not_crowd_out_many_small_ones() -> None:
    large = ModelProfile("large", 4, (60 * 10**9,), 1000, 0.1, 0.0, 0.01, ends=False)
    loads = [ModelLoad(large, 1.0, 2.0, 0.1)]
    loads += [ModelLoad(toy("small", nbytes=30), 0.5, 1.0, 1.0)] * 16
    assert {each.model for each in place_copies(loads, EIGHT)} == set(range(1, 17))


# WarmServe.


def test_sets_that_cross_do_not_nest() -> None:
    a, b, c = (Device(i, 0, 1.0) for i in range(3))
    replica = Replica(0, (a, b), 1.0)
    assert all(replica.nests(group) for group in [(a,), (b, a), (a, b, c), (c,)])
    assert not replica.nests((b, c))


def test_a_replica_goes_to_any_devices_on_which_it_nests_aligned_ones_first() -> None:
    wide = MODELS["llama2-70b"]
    fleet = Fleet(requests([toy("a"), wide], [(1e6, 0, 1, 1)]), EIGHT, POLICIES["warmserve"].make())
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


def test_a_draining_instance_lends_in_proportion_to_what_it_serves() -> None:
    model = toy("a", nbytes=12)
    fleet = Fleet(requests([model], [(1e6, 0, 1, 1)]), EIGHT, POLICIES["warmserve"].make())
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
