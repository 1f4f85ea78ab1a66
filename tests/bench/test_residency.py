"""Risk: a plan holds layers without need, exceeds the memory, or differs from plan to plan."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bounds.residency import Catalogue, Plan, Problem, plan, replan
from warmserve_rt.policy.curve import ValueCurve, value_curve
from warmserve_rt.policy.profile import ModelProfile

GB = 10**9
CHAT = ModelProfile("chat", 1, (GB // 5,) * 32, 1 << 19, 0.03, 1e-5, 0.01, ends=False)


def curve(name: str, nbytes: list[int], gains: list[float], width: int = 1) -> ValueCurve:
    value = np.concatenate(([0.0], np.cumsum(gains)))
    return ValueCurve(name, width, np.array(nbytes), value)


def problem(
    curves: list[ValueCurve], need: list[float], capacity: list[int], node: int = 8, **more: Any
) -> Problem:
    """Return a problem with one replica of each model, or with the replicas in ``model``."""
    model = np.array(more.pop("model", range(len(curves))), dtype=np.int64)
    arrays = {name: np.array(value) for name, value in more.items() if isinstance(value, list)}
    return Problem(
        Catalogue.of(curves), model, np.array(need), np.array(capacity), node, **{**more, **arrays}
    )


def best_value(asked: Problem) -> float:
    """Return the best value over all ways to give each replica a group and a number of layers."""
    curves = [asked.catalogue.curves[m] for m in asked.model]
    n, node = len(asked.capacity), asked.node_devices

    def ways(row: int) -> list[tuple[int, int]]:
        w = curves[row].width
        bases = [d for d in range(n - w + 1) if d % node % w == 0 and d % node + w <= node]
        return [(-1, 0)] + [(d, k) for d in bases for k in range(1, len(curves[row].value))]

    best = 0.0
    for choice in itertools.product(*(ways(row) for row in range(len(curves)))):
        left = asked.capacity.copy()
        for c, (base, k) in zip(curves, choice, strict=True):
            if base >= 0:
                left[base : base + c.width] -= c.cumulative[k]
        here = [(m, base) for m, (base, _) in zip(asked.model, choice, strict=True) if base >= 0]
        if (left >= 0).all() and len(set(here)) == len(here):
            rows = zip(asked.need, curves, choice, strict=True)
            best = max(best, float(sum(need * c.value[k] for need, c, (_, k) in rows)))
    return best


def check(found: Plan) -> None:
    """Check the properties that every plan must have."""
    asked = found.problem
    curves = [asked.catalogue.curves[m] for m in asked.model]
    used = np.zeros(len(asked.capacity), dtype=np.int64)
    on: set[tuple[int, int]] = set()
    for row, c in enumerate(curves):
        base, k = int(found.group[row]), int(found.layers[row])
        assert (base < 0) == (k == 0)
        if base >= 0:
            inside = base % asked.node_devices
            assert inside % c.width == 0
            assert inside + c.width <= asked.node_devices
            used[base : base + c.width] += c.nbytes[:k].sum()
            devices = {(int(asked.model[row]), d) for d in range(base, base + c.width)}
            assert not devices & on
            on |= devices
    assert (used <= asked.capacity).all()
    assert (used == found.device_bytes()).all()
    worth = sum(float(asked.need[r] * c.value[found.layers[r]]) for r, c in enumerate(curves))
    assert found.value == pytest.approx(worth)
    assert found.value <= found.bound * (1 + 1e-9)


LAYERS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=4)
NEEDS = st.integers(0, 8).map(lambda eighths: eighths / 8)


def curves_of(layers: list[list[tuple[int, int]]], widths: list[int]) -> list[ValueCurve]:
    return [
        curve(f"m{i}", [a for a, _ in each], [float(b) for _, b in each], width)
        for i, (each, width) in enumerate(zip(layers, widths, strict=True))
    ]


@given(st.lists(st.tuples(LAYERS, NEEDS), min_size=1, max_size=4), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_a_plan_for_one_device_is_within_one_step_of_the_best(
    models: list[tuple[list[tuple[int, int]], float]], capacity: int
) -> None:
    curves = curves_of([layers for layers, _ in models], [1] * len(models))
    found = plan(problem(curves, [need for _, need in models], [capacity]))
    check(found)
    best = best_value(found.problem)
    item = max(
        need * float(np.diff(c.value[c.knots]).max(initial=0))
        for c, (_, need) in zip(curves, models, strict=True)
    )
    assert found.value >= best - item - 1e-9
    assert found.bound >= best - 1e-9


@st.composite
def fleets(draw: st.DrawFn) -> Problem:
    """Draw up to three replicas of up to three models on up to four devices."""
    layers = draw(st.lists(LAYERS, min_size=1, max_size=3))
    node = draw(st.sampled_from([2, 3, 4]))
    widths = [draw(st.sampled_from([w for w in (1, 2, 3) if w <= node])) for _ in layers]
    model = draw(st.lists(st.integers(0, len(layers) - 1), min_size=1, max_size=3))
    capacity = draw(st.lists(st.integers(0, 20), min_size=1, max_size=4))
    need = [draw(NEEDS) for _ in model]
    return problem(curves_of(layers, widths), need, capacity, node, model=model)


@given(fleets())
@settings(max_examples=150, deadline=None)
def test_no_plan_is_better_than_the_bound(asked: Problem) -> None:
    found = plan(asked)
    check(found)
    assert found.bound >= best_value(asked) - 1e-9


@given(fleets(), st.data())
@settings(max_examples=150, deadline=None)
def test_nothing_moves_for_less_than_the_margin(asked: Problem, data: st.DataObject) -> None:
    factors = [data.draw(st.floats(1.0, 1.19)) for _ in asked.need]
    need = asked.need * np.array(factors)
    first = plan(replace(asked, margin=0.2), tries=1)
    second = replan(first, need, tries=1)
    check(second)
    assert (second.layers >= first.layers).all()
    held = first.group >= 0
    assert (second.group[held] == first.group[held]).all()


@given(fleets(), st.data())
@settings(max_examples=150, deadline=None)
def test_a_replan_gains_more_than_the_margin(asked: Problem, data: st.DataObject) -> None:
    first = plan(replace(asked, margin=0.2))
    need = asked.need * np.array([data.draw(st.floats(0, 3)) for _ in asked.need])
    second = replan(first, need)
    check(second)
    still = np.where(second.group == first.group, np.minimum(second.layers, first.layers), 0)
    worth, lost = 0.0, 0.0
    for r, m in enumerate(asked.model):
        value = asked.catalogue.curves[m].value
        worth += need[r] * value[first.layers[r]]
        lost += need[r] * (value[first.layers[r]] - value[still[r]])
    assert second.value - worth >= 0.2 * lost - 1e-9


@given(fleets(), st.data())
@settings(max_examples=100, deadline=None)
def test_any_state_can_be_planned_from(asked: Problem, data: st.DataObject) -> None:
    """The state may hold more than fits, two replicas in one place, or layers unrelated to need."""
    width, node, n = asked.catalogue.width[asked.model], asked.node_devices, len(asked.capacity)
    home = [
        data.draw(
            st.sampled_from(
                [-1] + [d for d in range(n - w + 1) if d % node % w == 0 and d % node + w <= node]
            )
        )
        for w in width.tolist()
    ]
    held = [data.draw(st.integers(0, 5)) for _ in home]
    share = [data.draw(st.floats(0, 1)) for _ in range(n)]
    asked = replace(asked, home=np.array(home), held=np.array(held), availability=np.array(share))
    found = plan(asked)
    check(found)
    assert found.bound == pytest.approx(plan(replace(asked, home=None, held=None)).bound)


def test_a_gain_above_the_margin_replaces_held_layers() -> None:
    curves = [curve("a", [4], [1.0]), curve("b", [4], [1.0])]
    first = plan(problem(curves, [1.0, 0.9], [4]))
    assert first.layers.tolist() == [1, 0]
    assert replan(first, np.array([1.0, 1.05])).layers.tolist() == [1, 0]
    assert replan(first, np.array([1.0, 1.15])).layers.tolist() == [0, 1]
    again = plan(replace(first.problem, need=np.array([1.0, 1.05])), previous=first)
    assert again.layers.tolist() == [1, 0]


def test_a_new_replica_does_not_displace_a_staying_replica() -> None:
    """The new replica is worth most, and takes the device that holds no staying replica."""
    curves = [curve(name, [4], [1.0]) for name in "abc"]
    asked = problem(curves, [1.0, 1.0, 5.0], [4, 4, 4], home=[0, 2, -1], held=[1, 1, 0])
    assert plan(asked).group.tolist() == [0, 2, 1]


def test_more_tries_are_never_worse() -> None:
    """Two models of width 1 with slightly more value per byte break up the only group of four."""
    curves = [curve("n", [6], [6.0])] * 2 + [curve("w", [5], [19.0], 4)]
    asked = problem(curves, [1.0] * 3, [9] * 4, node=4)
    once, often = plan(asked, tries=1), plan(asked)
    assert (once.value, often.value) == (12.0, 19.0)
    assert often.bound == once.bound


def test_availability_decides_between_devices_with_room() -> None:
    asked = problem([curve("a", [4], [1.0])], [1.0], [9, 9, 9], availability=[0.1, 0.2, 1.0])
    assert plan(asked).group.tolist() == [2]
    full = replace(asked, capacity=np.array([3, 9, 3]))
    assert plan(full).group.tolist() == [1]


def test_replicas_of_one_model_never_share_a_device() -> None:
    asked = problem([curve("a", [1], [1.0])], [3.0, 2.0, 1.0], [9, 9], model=[0, 0, 0])
    found = plan(asked)
    check(found)
    assert sorted(found.group.tolist()) == [-1, 0, 1]
    assert found.gap == 0  # the bound knows that the third has no device


def test_a_plan_may_hold_nothing() -> None:
    for asked in (problem([A], [], [9], model=[]), problem([A], [0.0], [9])):
        asked = replace(asked, model=asked.model.astype(np.int64))
        found = plan(asked)
        check(found)
        assert (found.value, found.bound, found.gap) == (0, 0, 0)


def test_a_need_of_the_smallest_float_gives_a_valid_plan() -> None:
    wide = curve("w", [1], [1.0], 2)
    found = plan(problem([wide, wide], [5e-324, 5e-324], [0, 0, 1, 1], node=2))
    check(found)


def test_a_model_larger_than_its_device_keeps_leading_layers() -> None:
    found = plan(problem([curve("a", [4] * 5, [1.0] * 5)], [1.0], [10]))
    assert found.layers.tolist() == [2]
    assert found.gap == 0
    assert plan(problem([curve("a", [4], [1.0])], [1.0], [0])).layers.tolist() == [0]


def test_wide_models_fill_groups_within_a_node() -> None:
    curves = [curve("w", [4], [1.0], 2), curve("x", [4], [2.0], 3)]
    found = plan(problem(curves, [1.0, 1.0], [4, 4, 4, 4, 4], node=3))
    check(found)
    assert found.group.tolist() == [3, 0]


def test_the_objective_chooses_between_a_knee_and_floors() -> None:
    """With room for one knee or both floors, the mean takes the knee and the budget the floors."""
    profiles = [replace(CHAT, name=name) for name in ("often", "seldom")]
    need, found = [4.0, 1.0], {}
    for objective in ("mean", "slo"):
        curves = [value_curve(p, 10e9, 500, budget_s=0.3, objective=objective) for p in profiles]
        floor = int(np.argmax(value_curve(CHAT, 10e9, 500, budget_s=0.3, objective=1).value > 0.1))
        capacity = 2 * floor * CHAT.layer_bytes[0]
        found[objective] = plan(problem(curves, need, [capacity])).layers.tolist()
    assert found["slo"] == [floor, floor]
    assert found["mean"][0] == value_curve(CHAT, 10e9, 500).knots[-1]
    assert found["mean"][1] < floor


# Bad input

A = curve("a", [4], [1.0])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"need": [math.nan]}, "need"),
        ({"need": [-1.0]}, "need"),
        ({"need": [math.inf]}, "need"),
        ({"need": [1.0, 1.0]}, "need"),
        ({"need": [1]}, "need: must be float64"),
        ({"model": [1]}, "model: must be from 0 to 0"),
        ({"capacity": [-1]}, "capacity"),
        ({"capacity": [1.5]}, "capacity: must be 1 of int64"),
        ({"capacity": []}, "capacity"),
        ({"node": 0}, "nodes of 0"),
        ({"margin": -0.1}, "margin"),
        ({"margin": math.nan}, "margin"),
        ({"availability": [2.0]}, "availability"),
        ({"availability": [math.nan]}, "availability"),
        ({"availability": [1.0, 1.0]}, "availability"),
        ({"home": [0]}, "both or neither"),
        ({"home": [1], "held": [0]}, "home: must be from -1 to 0"),
        ({"home": [0], "held": [-1]}, "held: must be at least 0, got -1"),
        ({"curves": [curve("broad", [4], [1.0], 16)]}, "broad needs 16 devices"),
        (
            {"curves": [curve("w", [4], [1.0], 2)], "capacity": [9] * 4, "home": [1], "held": [1]},
            "replica 0 of w: device 1 is not the first of a group of 2",
        ),
    ],
)
def test_invalid_problems_are_refused(more: dict[str, Any], said: str) -> None:
    given_: dict[str, Any] = {"curves": [A], "need": [1.0], "capacity": [9], **more}
    with pytest.raises(ValueError, match=said):
        problem(**given_)


def test_invalid_previous_plans_and_catalogues_are_refused() -> None:
    one = problem([A], [1.0], [9])
    with pytest.raises(ValueError, match="previous plan must have 2 replicas, has 1"):
        plan(problem([A, A], [1.0, 1.0], [9]), previous=plan(one))
    with pytest.raises(ValueError, match="tries must be at least 1, got 0"):
        plan(one, tries=0)
    with pytest.raises(ValueError, match="catalogue"):
        Catalogue.of([])
