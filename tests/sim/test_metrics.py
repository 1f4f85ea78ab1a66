"""Risk: a number in a comparison is not what its name says."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.study.intervals import (
    difference,
    highest_rate,
    interval,
    ratio,
    t_quantile,
)
from warmserve_rt.sim.study.metrics import Slo, quantile, summary
from warmserve_rt.sim.workload.history import with_history
from warmserve_rt.sim.workload.workloads import Workload

QUICK = ModelProfile("quick", 1, (1, 8, 1), 1, 0.02, 0.001, 0.01)
SLOW = ModelProfile("slow", 1, (1, 8, 1), 1, 0.1, 0.0, 0.01)


def workload(time: list[float], model: list[int], prompt: list[int]) -> Workload:
    n = len(time)
    return Workload(
        name="four",
        models=(QUICK, SLOW),
        time=np.array(time, float),
        model=np.array(model, np.int32),
        prompt=np.array(prompt, np.int32),
        output=np.ones(n, np.int32),
        duration=10.0,
        history_window=5.0,
        history=np.ones((1, 2)),
        service=np.array([1.0, 1.0]),
        dispersion=np.ones((1, 2)),
    )


def fleet(first_token: list[float], **changes: Any) -> Any:
    """Return a stand-in for a fleet after four requests, at 0, 1, 2 and 3 s."""
    served = {
        "workload": workload([0, 1, 2, 3], [0, 0, 1, 1], [80, 180, 5, 5]),
        "first_token": np.array(first_token),
        "hardware": Hardware(devices=2, node_devices=2, bandwidth=100.0),
        "clock": SimpleNamespace(now=20.0),
        "links": SimpleNamespace(loaded_bytes=1000.0),
        "start_hits": 3,
        "start_layers": 12,
        "memory": SimpleNamespace(wasted_bytes=250.0),
        "device_seconds": 36.0,
        "starts": 4,
    }
    return SimpleNamespace(**{**served, **changes})


def test_the_summary_of_four_requests_matches_hand_computed_numbers() -> None:
    # Bounds: 5 x 0.1 + 0.2, 5 x 0.2 + 0.2, 5 x 0.1 + 0.2 twice.
    found = summary(fleet([0.5, 2.1, 2.7001, 3.1]))
    assert (found.requests, found.unserved, found.starts) == (4, 0, 4)
    assert found.ttft_mean == pytest.approx((0.5 + 1.1 + 0.7001 + 0.1) / 4)
    assert found.ttft_p50 == pytest.approx(0.5)
    assert found.ttft_p95 == found.ttft_p99 == pytest.approx(1.1)
    assert found.slo_miss == 0.25
    assert found.hit_share == 0.25
    assert (found.loaded_bytes, found.wasted_bytes) == (1000.0, 250.0)
    assert found.gpu_hours == pytest.approx(0.01)
    assert found.link_use == pytest.approx(1000 / (100 * 2 * 20))


def test_a_request_that_was_never_served_counts_as_infinitely_late() -> None:
    found = summary(fleet([0.5, math.nan, 2.3, 3.1]))
    assert found.unserved == 1
    assert found.slo_miss == 0.25
    assert (found.ttft_mean, found.ttft_p99) == (math.inf, math.inf)
    assert found.ttft_p50 == pytest.approx(0.3)


def test_the_hit_share_is_undefined_without_starts() -> None:
    assert math.isnan(summary(fleet([1.0] * 4, start_layers=0, start_hits=0)).hit_share)


def test_a_summary_without_requests_is_refused() -> None:
    with pytest.raises(ValueError, match="no requests"):
        summary(fleet([], workload=workload([], [], [])))


@given(st.lists(st.floats(0, 100), min_size=1), st.floats(0.01, 1))
def test_a_quantile_is_the_smallest_time_that_covers_its_share(
    times: list[float], share: float
) -> None:
    found = quantile(np.sort(times), share)
    assert sum(time <= found for time in times) >= share * len(times) - 1e-9
    assert sum(time < found for time in times) < share * len(times)


@pytest.mark.parametrize(
    ("prefills", "seconds"), [(0.5, 0.0), (0.99, 0.0001), (math.nan, 0.2), (5, -1), (5, math.inf)]
)
def test_an_impossible_slo_is_refused(prefills: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="SLO"):
        Slo(prefills, seconds).check(workload([0.0], [0], [80]))


def test_an_slo_that_an_idle_fleet_just_meets_is_accepted() -> None:
    Slo(1.0, 0.0).check(workload([0.0], [0], [80]))


@pytest.mark.parametrize(
    ("degrees", "t"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227)],
)
def test_t_quantiles_match_published_tables(degrees: int, t: float) -> None:
    assert t_quantile(degrees) == pytest.approx(t, abs=6e-6)


def test_t_tends_to_the_normal_quantile() -> None:
    assert t_quantile(100_001) == pytest.approx(1.959964, abs=5e-5)
    assert t_quantile(9, 0.99) == pytest.approx(3.24984, abs=6e-6)
    with pytest.raises(ValueError, match="degrees"):
        t_quantile(0)


def test_an_interval_matches_hand_computed_numbers() -> None:
    found = interval([1.0, 2.0, 3.0])
    half = 4.30265 / math.sqrt(3)
    assert (found.mean, found.low) == (2.0, pytest.approx(2 - half, abs=1e-5))
    assert found.high == pytest.approx(2 + half, abs=1e-5)


@pytest.mark.parametrize("values", [[7.0], [1.0, math.inf], [1.0, math.nan]])
def test_single_and_infinite_values_have_no_interval(values: list[float]) -> None:
    found = interval(values)
    assert found.low is None
    assert found.high is None
    assert found.mean == sum(values) or math.isnan(found.mean)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=8), st.floats(0.1, 10))
def test_pairing_removes_variation_that_seeds_share(values: list[float], factor: float) -> None:
    """A policy that is always ``factor`` times slower shows exactly that, however seeds differ."""
    found = ratio([value * factor for value in values], values)
    assert found.mean == pytest.approx(factor)
    assert found.low == pytest.approx(factor, rel=1e-6)
    assert found.high == pytest.approx(factor, rel=1e-6)
    shifted = difference([value + factor for value in values], values)
    assert shifted.low == pytest.approx(factor)
    assert shifted.high == pytest.approx(factor)


def test_a_ratio_of_values_that_are_not_positive_is_undefined() -> None:
    assert math.isnan(ratio([0.0, 1.0], [1.0, 1.0]).mean)
    assert math.isnan(ratio([math.inf], [math.inf]).mean)
    assert ratio([math.inf, 1.0], [1.0, 1.0]).mean == math.inf
    assert ratio([1.0, 1.0], [math.inf, 1.0]).mean == 0.0
    with pytest.raises(ValueError, match="zip"):
        ratio([1.0], [1.0, 1.0])


def test_the_highest_rate_may_exceed_a_rate_that_fails() -> None:
    found = highest_rate([3, 1, 2, 4], [0.99, 0.995, 0.97, 0.5], 0.99)
    assert (found.rate, found.failing) == (3, (2,))
    assert highest_rate([1, 2], [0.98, 0.9], 0.99).rate is None
    assert highest_rate([1, 2], [1.0, 0.9], 0.99).failing == ()


def test_the_beginning_of_a_trace_becomes_its_history_only() -> None:
    whole = workload([0, 1, 4.9, 5, 9], [0, 0, 1, 1, 0], [1, 2, 3, 4, 5])
    cut = with_history(whole, 9.0)  # one whole window of 5 s
    assert cut.history.tolist() == [[2 / 5, 1 / 5]]
    assert cut.time.tolist() == [0, 4]
    assert cut.prompt.tolist() == [4, 5]
    assert cut.duration == 5.0
    assert (cut.dispersion >= 1).all()


@pytest.mark.parametrize("seconds", [0.0, 4.9, -1.0, math.nan])
def test_a_trace_without_a_window_of_history_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="no history"):
        with_history(workload([0.0, 7.0], [0, 0], [1, 1]), seconds)


def test_a_trace_without_requests_after_its_history_is_refused() -> None:
    with pytest.raises(ValueError, match="no requests after"):
        with_history(workload([0.0, 4.0], [0, 0], [1, 1]), 5.0)
