"""Risk: layers are valued at other seconds than they save, and the wrong ones are held."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pipeline_forms import floor_layers

from warmserve_rt.policy.curve import ValueCurve, value_curve
from warmserve_rt.policy.explain import sentence
from warmserve_rt.policy.pipeline import first_token
from warmserve_rt.policy.profile import ModelProfile

GB = 10**9
CHAT = ModelProfile("chat", 1, (GB // 5,) * 32, 1 << 19, 0.03, 1e-5, 0.01, ends=False)
WIDE = ModelProfile("wide", 2, (GB // 5,) * 40, 1 << 19, 0.05, 1e-5, 0.01)
LAYERS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4)


def test_the_mean_objective_values_the_seconds_saved() -> None:
    made = value_curve(CHAT, 10e9, 500)
    loads = [each / 10e9 for each in CHAT.layer_bytes]
    computes = CHAT.compute(CHAT.prefill(500))
    for k in range(33):
        saved = first_token(loads, computes, 0) - first_token(loads, computes, k)
        assert made.value[k] == pytest.approx(saved)
    mixed = value_curve(CHAT, 10e9, [100, 900])
    each = [value_curve(CHAT, 10e9, tokens).value for tokens in (100, 900)]
    assert mixed.value == pytest.approx(np.mean(each, axis=0))


def test_the_budget_adds_a_step_to_the_curve() -> None:
    loads = [each / 10e9 for each in CHAT.layer_bytes]
    computes = CHAT.compute(CHAT.prefill(500))
    floor = floor_layers(loads, computes, 0.3)
    assert floor is not None
    whole = first_token(loads, computes, 0) - first_token(loads, computes, 32)
    half = value_curve(CHAT, 10e9, 500, budget_s=0.3, objective=0.5)
    mean = value_curve(CHAT, 10e9, 500)
    step = half.value - 0.5 * mean.value
    assert step[:floor] == pytest.approx(0)
    assert step[floor:] == pytest.approx(0.5 * whole)
    for budget in (0.0, 10.0):  # unreachable, and met by a cold start: nothing to gain
        none = value_curve(CHAT, 10e9, 500, budget_s=budget, objective="slo")
        assert none.value == pytest.approx(1e-3 * mean.value)


@given(LAYERS, st.integers(1, 3))
@settings(deadline=None)
def test_densities_fall_along_the_layers_and_add_up(
    layers: list[tuple[int, int]], width: int
) -> None:
    value = np.cumsum([0.0, *(float(gain) for _, gain in layers)])
    made = ValueCurve("m", width, np.array([nbytes for nbytes, _ in layers]), value)
    assert (np.diff(made.density) <= 1e-12).all()
    assert float(made.density @ made.nbytes) * width == pytest.approx(made.value[-1])


# Explanations


def test_a_sentence_names_kept_layers_the_reason_and_evicted_layers() -> None:
    chat, wide = value_curve(CHAT, 10e9, 500), value_curve(WIDE, 10e9, 500)
    assert sentence(chat, 4.1, 12, 0, [(wide, 10)]) == (
        "keeps 12 of 32 layers of chat on device 0: 4.1 expected starts, 0.41 ms saved per MB; "
        "evicts 10 layers of wide"
    )
    assert sentence(wide, 0.001, 0, 0, ()).startswith(
        "keeps nothing of wide: 0.001 expected starts, its first layers would save "
    )
    assert " layers of wide on devices 2-3: " in sentence(wide, 1.0, 3, 2, ())


# Bad input


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"objective": "median"}, "must be 'mean', 'slo' or a weight .* got 'median'"),
        ({"objective": 1.5}, "got 1.5"),
        ({"objective": math.nan}, "got nan"),
        ({"budget_s": math.nan}, "budget"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"tier": 0.5e9}, "a tier must be at least as fast as the bandwidth"),
        ({"tier": math.nan}, "a tier must be at least as fast"),
        ({"resident": -1}, "resident must be layers in"),
        ({"resident": 1000}, "resident must be layers in"),
        ({"tokens": -1}, "prompts"),
        ({"tokens": []}, "prompts"),
    ],
)
def test_invalid_curve_arguments_are_refused(options: dict[str, Any], said: str) -> None:
    arguments: dict[str, Any] = {"bandwidth": 1e9, "tokens": 10, **options}
    with pytest.raises(ValueError, match=said):
        value_curve(CHAT, **arguments)


def test_a_tier_is_worth_the_seconds_between_its_speed_and_the_one_below() -> None:
    none, all_ = (value_curve(CHAT, speed, 500).value[-1] for speed in (2e9, 10e9))
    tier = value_curve(CHAT, 2e9, 500, tier=10e9)
    assert tier.value[-1] == pytest.approx(none - all_)
    assert (tier.value <= value_curve(CHAT, 2e9, 500).value + 1e-12).all()
    rest = value_curve(CHAT, 2e9, 500, tier=10e9, resident=3)
    assert rest.nbytes.tolist() == list(CHAT.layer_bytes[3:])
    held = [value_curve(CHAT, speed, 500).value for speed in (2e9, 10e9)]
    assert rest.value[-1] == pytest.approx((held[0][-1] - held[0][3]) - (held[1][-1] - held[1][3]))


@pytest.mark.parametrize(
    ("width", "nbytes", "value", "said"),
    [
        (0, [1], [0, 1], "width must be at least 1 device, got 0"),
        (1, [], [0], "must have layers"),
        (1, [0], [0, 1], "each of at least one byte"),
        (1, [1], [0, 1, 2], "shape"),
        (1, [1], [1, 2], "begin at 0"),
        (1, [1, 1], [0, 2, 1], "never fall"),
        (1, [1], [0, math.nan], "finite"),
    ],
)
def test_invalid_value_curves_are_refused(
    width: int, nbytes: list[int], value: list[float], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ValueCurve("a", width, np.array(nbytes), np.array(value, float))
