"""Risk: static sharing is weaker, or stronger, than the systems that it stands for."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_checks import EIGHT, toy, ttft, workload

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.controllers.baselines.balance import KV_TOKENS, ModelLoad, place_copies
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload.catalogue import mixed
from warmserve_rt.sim.workload.workloads import power_law

STATIC = ("sharing", "fixed-shares")


@pytest.mark.parametrize("interference", [0.0, 0.35, 1.0])
def test_neighbours_slow_each_other_while_both_work(interference: float) -> None:
    one = Hardware(devices=1, node_devices=1, interference=interference)
    models = [toy("a"), toy("b")]

    def run(*rows: tuple[float, int, int, int]) -> Any:
        return ttft(simulate("sharing", workload(models, rows), one))

    assert run((0.0, 0, 9, 1)) == pytest.approx([0.2])
    assert run((0.0, 0, 9, 1), (0.0, 1, 9, 1)) == pytest.approx([0.2 * (1 + interference)] * 2)
    # The second arrives when the first is half done, and runs its own last half alone.
    both = 0.1 + 0.1 * (1 + interference)
    assert run((0.0, 0, 9, 1), (0.1, 1, 9, 1)) == pytest.approx([both] * 2)


def test_a_busy_neighbour_slows_decoding() -> None:
    one = Hardware(devices=1, node_devices=1, interference=1.0)
    two = workload([toy("a"), toy("b")], [(0.0, 0, 9, 101), (0.5, 1, 9, 1)])
    fleet = simulate("sharing", two, one)
    # 0.2 s of prefill and 1 s of decoding; for 0.4 s, beside a prefill, decoding was half as fast.
    assert fleet.finished[0] == pytest.approx(0.2 + 1.0 + 0.2)


def test_fixed_shares_are_slow_beside_idle_neighbours() -> None:
    one = Hardware(devices=1, node_devices=1)
    models = [toy("a"), toy("b"), toy("c")]
    fleet = simulate("fixed-shares", workload(models, [(0.0, 0, 9, 3)]), one)
    assert ttft(fleet) == pytest.approx([0.6])
    assert fleet.finished[0] == pytest.approx(0.6 + 2 * 0.03)


def test_more_interference_is_slower() -> None:
    eight = power_law(mixed(8), 0.6, 120, 1)
    means = [
        ttft(simulate("sharing", eight, replace(EIGHT, interference=x))).mean()
        for x in (0.0, 0.35, 1.0)
    ]
    assert means[0] < means[1] < means[2]


@pytest.mark.parametrize("policy", STATIC)
def test_requests_of_models_without_a_placement_are_refused(policy: str) -> None:
    models = [toy("a", nbytes=30), toy("b", nbytes=30), toy("c", nbytes=30)]
    one = Hardware(devices=1, node_devices=1, memory=70e9)
    rows = [(float(i), i % 3, 9, 9) for i in range(9)]
    fleet = simulate(policy, workload(models, rows), one)
    assert fleet.refused.sum() == 3
    assert (np.isnan(fleet.first_token) == fleet.refused).all()
    assert fleet.now < 60


@pytest.mark.parametrize("policy", STATIC)
def test_a_request_waits_until_the_shared_cache_has_room(policy: str) -> None:
    """One request fills the device's cache; a request of the other model waits until it is done.

    A request that is larger than the cache is still served.
    """
    models = [toy("a"), toy("b")]
    one = Hardware(devices=1, node_devices=1, memory=20e9 + 3e6)  # 3,000 tokens
    rows = [(0.0, 0, 2000, 500), (0.1, 1, 1000, 10), (60.0, 1, 5000, 10)]
    fleet = simulate(policy, workload(models, rows), one)
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
def test_a_placement_fits_and_omits_only_models_that_do_not_fit(loads: list[ModelLoad]) -> None:
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


def test_further_copies_are_of_the_model_with_the_fullest_copies() -> None:
    profile = toy("a")
    loads = [ModelLoad(profile, 60.0, 90.0, 9.0), ModelLoad(profile, 5.0, 10.0, 1.0)]
    copies = Counter(each.model for each in place_copies(loads, EIGHT))
    assert copies == {0: 6, 1: 1}


def test_a_large_unpopular_model_does_not_displace_many_small_ones() -> None:
    large = ModelProfile("large", 4, (60 * 10**9,), 1000, 0.1, 0.0, 0.01, ends=False)
    loads = [ModelLoad(large, 1.0, 2.0, 0.1)]
    loads += [ModelLoad(toy("small", nbytes=30), 0.5, 1.0, 1.0)] * 16
    assert {each.model for each in place_copies(loads, EIGHT)} == set(range(1, 17))
