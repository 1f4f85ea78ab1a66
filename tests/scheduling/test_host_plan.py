"""Risk: a host tier holds layers that save less than others, or a fleet whose host memory holds
every layer is planned in another way than one without a tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from warmserve_rt.policy.demand import QUANTILES, TYPICAL, Demand
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.improve import Copy
from warmserve_rt.policy.pipeline import first_token
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.host_plan import HostPlan, explain_host, file_seconds, plan_host
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload import catalogue, workloads

LINK, FILES = 100.0, 20.0  # bytes per second
LAYER = 10  # bytes


@dataclass
class Tier:
    """A host tier with room for some layers."""

    nbytes: float
    held: dict[int, list[bool]]
    devices: Sequence[int] = (0,)
    file_bandwidth: float = FILES

    def holds(self, model: int) -> Sequence[bool]:
        return self.held[model]

    def hold(self, plan: Any) -> None:
        raise NotImplementedError


@dataclass
class Planned:
    """The parts of a fleet that a host plan uses."""

    profiles: Sequence[ModelProfile]
    devices: Sequence[int] = (0,)
    bandwidth: float = LINK


def model(layers: int, prefill: float, width: int = 1) -> ModelProfile:
    return ModelProfile("m", width, (LAYER,) * layers, 0, prefill, 0.001, 0.01, ends=False)


def planned(
    profiles: Sequence[ModelProfile],
    need: Sequence[float],
    copies: Sequence[Copy],
    tier: Tier,
    fleet: Planned | None = None,
) -> HostPlan:
    demand = Demand(profiles, Forecaster(len(profiles)), [1.0] * len(profiles), bandwidth=LINK,
                    objective="mean")  # fmt: skip
    fleet = fleet or Planned(profiles)
    return plan_host(fleet, tier, copies, np.array(need), demand, margin=0.0)  # type: ignore[arg-type]


def empty(profiles: Sequence[ModelProfile], room: int, **more: Any) -> Tier:
    """Return a tier with room for this many layers."""
    held = {m: [False] * len(p.layer_bytes) for m, p in enumerate(profiles)}
    return Tier(room * LAYER, held, **more)


def seconds(profile: ModelProfile, resident: int, in_tier: int) -> float:
    """Return the mean first token of a start with this many layers in the tier, the ones after
    those that are resident."""
    layers = len(profile.layer_bytes)
    slow = layers - resident - in_tier
    loads = [0.0] * resident + [LAYER / LINK] * in_tier + [LAYER / FILES] * slow
    prompts = np.quantile(TYPICAL, QUANTILES)
    each = [first_token(loads, profile.compute(profile.prefill(tokens)), 0) for tokens in prompts]
    return float(np.mean(each))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.floats(0.0, 3.0), st.floats(0.0, 2.0), st.integers(0, 4)),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 10),
)
def test_no_other_choice_of_layers_saves_more(
    models: list[tuple[int, float, float, int]], room: int
) -> None:
    profiles = [model(layers, prefill) for layers, prefill, _, _ in models]
    need = [each for _, _, each, _ in models]
    resident = [min(held, layers) for layers, _, _, held in models]
    copies = [Copy(m, 0, k, use=1.0) for m, k in enumerate(resident) if k]
    plan = planned(profiles, need, copies, empty(profiles, room))
    chosen = [0] * len(models)
    for m, values in plan.values.items():
        held = np.flatnonzero(values > 0).tolist()
        assert held == list(range(resident[m], resident[m] + len(held)))
        chosen[m] = len(held)
    assert sum(chosen) <= room

    def saved(counts: Sequence[int]) -> float:
        return sum(
            need[m] * (seconds(p, resident[m], 0) - seconds(p, resident[m], count))
            for m, (p, count) in enumerate(zip(profiles, counts, strict=True))
        )

    ranges = [range(len(p.layer_bytes) - k + 1) for p, k in zip(profiles, resident, strict=True)]
    best = max(saved(counts) for counts in product(*ranges) if sum(counts) <= room)
    assert saved(chosen) == pytest.approx(best, rel=1e-6, abs=1e-9)


def test_the_layers_that_a_copy_leaves_are_held_first() -> None:
    profiles = [model(4, 0.0), model(4, 0.0)]
    copies = [Copy(0, 0, 3, use=0.9)]
    plan = planned(profiles, [1.0, 0.5], copies, empty(profiles, 5))
    assert (plan.values[0] > 0).tolist() == [False, False, False, True]
    assert (plan.values[1] > 0).tolist() == [True] * 4
    plan = planned(profiles, [1.0, 0.5], copies, empty(profiles, 8))  # there is room for all
    assert (plan.values[0] > 0).all()


def test_a_tier_serves_the_starts_on_its_own_devices() -> None:
    profiles = [model(4, 0.0)]
    fleet = Planned(profiles, devices=range(4))
    copies = [Copy(0, 0, 2, use=0.9), Copy(0, 3, 1, use=0.1)]
    first = planned(profiles, [1.0], copies, empty(profiles, 9, devices=(0, 1)), fleet)
    other = planned(profiles, [1.0], copies, empty(profiles, 9, devices=(2, 3)), fleet)
    assert (first.values[0] > 0).tolist() == [False, False, True, True]
    assert (other.values[0] > 0).tolist() == [False, True, True, True]
    assert (first.starts[0], other.starts[0]) == pytest.approx((0.9, 0.1))


def test_all_ranks_of_a_layer_take_room() -> None:
    profiles = [model(4, 0.0, width=2)]
    fleet = Planned(profiles, devices=range(2))
    plan = planned(profiles, [1.0], [], empty(profiles, 5, devices=(0, 1)), fleet)
    assert int((plan.values[0] > 0).sum()) == 2


def test_an_explanation_names_the_layers_that_a_tier_gains() -> None:
    profiles = [replace(model(4, 0.0), name="chat"), replace(model(4, 0.0), name="code")]
    tier = empty(profiles, 8, devices=(4, 5))
    tier.held[1] = [True] * 4
    fleet = Planned(profiles, devices=range(8))
    said = explain_host(planned(profiles, [0.5, 0.5], [], tier, fleet), profiles)
    assert len(said) == 1
    start = "keeps 4 of 4 layers of chat in host memory of devices 4-5: 0.12 expected starts, "
    assert said[0].startswith(start)


def test_starts_are_later_by_the_layers_that_lie_in_files() -> None:
    profiles = [model(4, 0.0)]
    tier = empty(profiles, 4)
    tier.held[0] = [True, False, True, False]
    later = LAYER / FILES - LAYER / LINK
    found = file_seconds(Planned(profiles), tier, 0)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([2 * later, 2 * later, later, later, 0.0])


# Simulated fleets.


def served(**hardware: Any) -> Fleet:
    requests = workloads.power_law(catalogue.mixed(6), 1.0, 30.0, 3)
    options = hardware.pop("options", {})
    return simulate("scheduler", requests, Hardware(4, 4, 40e9, **hardware), policy_options=options)


def results(fleet: Fleet) -> tuple[bytes, bytes, float, int]:
    scheduler = fleet.controller.scheduler  # type: ignore[attr-defined]
    assert scheduler.host_plans == []
    return (
        fleet.first_token.tobytes(),
        fleet.finished.tobytes(),
        fleet.links.loaded_bytes,
        [(copy.model, copy.first, copy.layers, copy.use) for copy in scheduler.held],
    )  # type: ignore[return-value]


def test_infinite_host_memory_is_planned_as_if_it_were_no_tier() -> None:
    """The disk is then never read, and nothing depends on its speed or on the option."""
    expected = results(served())
    assert results(served(disk_bandwidth=1.0)) == expected
    assert results(served(options={"plan_hosts": False})) == expected


def test_planned_host_memory_is_used_and_filled_in_the_background() -> None:
    small = {"host_memory": 40e9, "disk_bandwidth": 6e9}
    fleet = served(**small)
    scheduler = fleet.controller.scheduler  # type: ignore[attr-defined]
    (plan,) = scheduler.host_plans
    assert any((values > 0).any() for values in plan.values.values())
    assert fleet.links.prefetches[0].loaded_bytes > 0
    lru = served(**small, options={"plan_hosts": False})
    assert lru.links.prefetches[0].loaded_bytes == 0
    assert np.mean(fleet.first_token) < np.mean(lru.first_token)
