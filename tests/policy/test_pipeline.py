"""Risk: a start is predicted earlier than its bytes can arrive, or later than it happens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pipeline_forms import floor_layers, knee, uniform_first_token, uniform_floor

from warmserve_rt.policy.pipeline import first_token, first_token_by_prefix

TIMES = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=12
)  # whole ticks, so that the simulation is exact


def stepped(loads: list[int], computes: list[int], resident: set[int]) -> int:
    """Simulate the pipeline tick by tick, and return the time of the first token.

    A link fetches the missing layers in order. A device computes the layers one by one, each once
    it is resident.
    """
    here = set(resident)
    queue = [[layer, loads[layer]] for layer in range(len(loads)) if layer not in resident]
    layer, left, now = 0, computes[0], 0
    while True:
        while queue and queue[0][1] == 0:  # a finished load takes no more ticks
            here.add(queue.pop(0)[0])
        while layer < len(loads) and layer in here and left == 0:
            layer += 1
            left = computes[layer] if layer < len(loads) else 0
        if layer == len(loads):
            return now
        now += 1
        if queue:
            queue[0][1] -= 1
        if layer in here:
            left -= 1


@given(TIMES, st.data())
def test_the_formula_matches_a_stepped_pipeline(
    times: list[tuple[int, int]], data: st.DataObject
) -> None:
    loads, computes = [a for a, _ in times], [b for _, b in times]
    resident = data.draw(st.sets(st.integers(0, len(times) - 1)))
    assert first_token(loads, computes, resident) == stepped(loads, computes, resident)
    by_prefix = first_token_by_prefix(loads, computes)
    for k in range(len(times) + 1):
        expected = stepped(loads, computes, set(range(k)))
        assert first_token(loads, computes, k) == expected
        assert by_prefix[k] == expected


@given(TIMES, st.data())
def test_layers_of_a_faster_tier_match_a_stepped_pipeline(
    times: list[tuple[int, int]], data: st.DataObject
) -> None:
    loads, computes = [a for a, _ in times], [b for _, b in times]
    faster = [data.draw(st.integers(0, load)) for load in loads]
    by_prefix = first_token_by_prefix(loads, computes, faster)
    for k in range(len(times) + 1):
        assert by_prefix[k] == stepped(faster[:k] + loads[k:], computes, set())


def test_a_slower_tier_is_refused() -> None:
    with pytest.raises(ValueError, match="must not load slower"):
        first_token_by_prefix([1.0, 1.0], [1.0, 1.0], [1.0, 1.5])


@given(TIMES, st.integers(0, 500))
def test_floors_are_the_fewest_that_meet_the_budget(
    times: list[tuple[int, int]], budget: int
) -> None:
    loads, computes = [a for a, _ in times], [b for _, b in times]
    met = [k for k in range(len(times) + 1) if stepped(loads, computes, set(range(k))) <= budget]
    assert floor_layers(loads, computes, budget) == (met[0] if met else None)
    warm = sum(computes)
    assert knee(loads, computes) == min(
        k for k in range(len(times) + 1) if stepped(loads, computes, set(range(k))) == warm
    )


@given(st.integers(1, 90), st.integers(0, 40), st.integers(0, 40), st.integers(0, 400))
def test_the_closed_form_is_the_general_one_for_equal_layers(
    layers: int, load: int, compute: int, extra: int
) -> None:
    loads, computes = [load] * layers, [compute] * layers
    for k in range(layers + 1):
        assert uniform_first_token(layers, load, compute, k) == first_token(loads, computes, k)
    floor = floor_layers(loads, computes, layers * compute + extra)
    assert uniform_floor(layers, load, compute, extra) == floor


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=90))
def test_rounding_moves_no_knee(times: list[tuple[float, float]]) -> None:
    loads, computes = [a for a, _ in times], [b for _, b in times]
    found = knee(loads, computes)
    everything = sum(loads) + sum(computes)
    by_prefix = first_token_by_prefix(loads, computes)
    assert (np.diff(by_prefix) <= 0).all()
    assert by_prefix[found] - sum(computes) <= 1e-11 * everything
    if found:
        assert by_prefix[found - 1] > sum(computes)


@pytest.mark.parametrize(
    ("layers", "prefill_ms", "load_ms", "cold_extra_ms", "at_knee", "at_100", "at_300"),
    [
        (32, 41, 16.2, 478, 30, 24, 12),
        (32, 304, 16.2, 223, 14, 8, 0),
        (40, 47.5, 12.7, 461, 37, 29, 13),
        (80, 403, 17.1, 971, 57, 51, 40),
        (80, 201, 8.2, 460, 56, 44, 20),
    ],
    ids=["7B", "7B-batch", "13B-TP2", "70B-TP4-A100", "70B-TP4-H100"],
)
def test_llama_models_match_hand_computed_values(
    layers: int,
    prefill_ms: float,
    load_ms: float,
    cold_extra_ms: float,
    at_knee: int,
    at_100: int,
    at_300: int,
) -> None:
    """Values computed by hand.

    Prefill of 512 (8x512, 512, 2048, 2048) tokens, links of 25 and 52 GB/s.
    """
    loads, computes = [load_ms] * layers, [prefill_ms / layers] * layers
    assert first_token(loads, computes, 0) - prefill_ms == pytest.approx(cold_extra_ms, rel=0.01)
    for extra, expected in ((0, at_knee), (100, at_100), (300, at_300)):
        assert floor_layers(loads, computes, prefill_ms + extra) == expected
        assert uniform_floor(layers, load_ms, prefill_ms / layers, extra) == expected


@pytest.mark.parametrize(
    ("loads", "computes", "resident", "said"),
    [
        ([1.0, -1.0], [1.0, 1.0], 0, "load times"),
        ([1.0, math.nan], [1.0, 1.0], 0, "load times"),
        ([1.0, 1.0], [1.0, math.inf], 0, "compute times"),
        ([1.0, 1.0], [1.0], 0, "one entry for each layer"),
        ([], [], 0, "one entry for each layer"),
        ([1.0], [1.0], 2, r"in \[0, 1\], got 2"),
        ([1.0], [1.0], -1, "resident layers must be .* got -1"),
        ([1.0], [1.0], [1], "resident layers"),
        ([1.0], [1.0], [-1], "resident layers"),
    ],
)
def test_invalid_input_is_refused(
    loads: list[float], computes: list[float], resident: object, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        first_token(loads, computes, resident)  # type: ignore[arg-type]


def test_invalid_and_extreme_budgets_are_handled() -> None:
    with pytest.raises(ValueError, match="budget"):
        floor_layers([1.0], [1.0], math.nan)
    assert floor_layers([1.0], [2.0], 1.5) is None
    assert floor_layers([1.0], [2.0], math.inf) == 0
