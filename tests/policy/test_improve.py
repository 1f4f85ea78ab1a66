"""Exchanges that are not the best, or lose more than they gain, would churn or starve models."""

from __future__ import annotations

import numpy as np
import pytest
from exchange_model import Held, Market
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba")

from warmserve_rt.policy.curve import ValueCurve
from warmserve_rt.policy.improve import Copy, Curves, improve

DEVICES, NODE = 8, 4


def curve(draw: st.DrawFn, name: str) -> ValueCurve:
    layers = draw(st.integers(1, 5))
    width = draw(st.sampled_from([1, 1, 2, 4]))
    nbytes = np.array([draw(st.integers(1, 9)) for _ in range(layers)], np.int64) * 1_000_003
    value = np.cumsum([0.0, *(draw(st.floats(0.0, 1.0)) for _ in range(layers))])
    return ValueCurve(name, width, nbytes, value)


@st.composite
def markets(
    draw: st.DrawFn,
) -> tuple[list[ValueCurve], list[float], list[Copy], list[float], list[float]]:
    curves = [curve(draw, f"m{i}") for i in range(draw(st.integers(1, 5)))]
    need = [draw(st.floats(0.0, 2.0)) for _ in curves]
    # Groups of equal availability are equally good, and are told apart by their free bytes.
    available = [draw(st.just(1.0) | st.floats(0.1, 1.0)) for _ in range(DEVICES)]
    free = [draw(st.integers(0, 30)) * 1_000_003.0 for _ in range(DEVICES)]
    copies = []
    for model, each in enumerate(curves):
        for first in range(0, DEVICES, each.width):
            if draw(st.booleans()):
                layers = draw(st.integers(1, len(each.nbytes)))
                copies.append(Copy(model, first, layers, fixed=draw(st.integers(0, 5)) == 0))
    return curves, need, copies, free, available


@settings(max_examples=150, deadline=None)
@given(markets(), st.sampled_from([0.0, 0.1, 0.5]), st.integers(1, 6), st.integers(0, 6))
def test_exchanges_are_those_of_a_plain_model(
    market: tuple[list[ValueCurve], list[float], list[Copy], list[float], list[float]],
    margin: float,
    most: int,
    moves: int,
) -> None:
    curves, need, copies, free, available = market
    found = improve(
        Curves(curves),
        np.array(need),
        copies,
        np.array(free),
        np.array(available),
        NODE,
        margin=margin,
        most=most,
        moves=moves,
    )
    held = [Held(c.model, c.first, c.layers, c.fixed) for c in copies]
    plain = Market(curves, need, held, list(free), available, NODE, margin, most)
    for _ in range(moves):
        if not plain.move():
            break
    assert sorted((c.model, c.first, c.layers) for c in found) == sorted(
        (h.model, h.first, h.layers) for h in plain.held
    )
    by_place = {(h.model, h.first): h.use for h in plain.held}
    for copy in found:
        assert copy.use == pytest.approx(by_place[copy.model, copy.first])
    after = list(free)
    for sign, group in ((1, [(c.model, c.first, c.layers) for c in copies]), (-1, found_of(found))):
        for model, first, layers in group:
            for device in range(first, first + curves[model].width):
                after[device] += sign * float(curves[model].cumulative[layers])
    assert min(after) >= 0 or min(after) >= min(free)  # never overfills a device further
    kept = {(c.model, c.first): c.layers for c in found}
    assert all(kept[c.model, c.first] == c.layers for c in copies if c.fixed)


def found_of(copies: list[Copy]) -> list[tuple[int, int, int]]:
    return [(c.model, c.first, c.layers) for c in copies]


@settings(max_examples=100, deadline=None)
@given(markets(), st.integers(1, 6))
def test_each_exchange_is_a_gain(
    market: tuple[list[ValueCurve], list[float], list[Copy], list[float], list[float]], most: int
) -> None:
    """Otherwise plans would repeat in a cycle."""
    curves, need, copies, free, _ = market
    available = [0.9] * DEVICES
    arrays = Curves(curves)

    def value(copies: list[Copy]) -> float:
        held = [Held(c.model, c.first, c.layers, c.fixed) for c in copies]
        return Market(curves, need, held, [], available, NODE, 0.0, most).value()

    for _ in range(100):
        found = improve(
            arrays,
            np.array(need),
            copies,
            np.array(free),
            np.array(available),
            NODE,
            margin=0.01,
            most=most,
            moves=1,
        )
        if sorted(found_of(found)) == sorted(found_of(copies)):
            return
        assert value(found) >= value(copies) * (1 - 1e-9)
        for sign, group in ((1, copies), (-1, found)):
            for copy in group:
                for device in range(copy.first, copy.first + curves[copy.model].width):
                    free[device] += sign * float(curves[copy.model].cumulative[copy.layers])
        copies = found
    raise AssertionError("exchanges do not end")


def steps(count: int) -> list[ValueCurve]:
    """Return models of eight layers that are worth 1 together, and 0 if a layer is missing."""
    value = np.array([0.0] * 8 + [1.0])
    nbytes = np.full(8, 1_000_000, np.int64)
    return [ValueCurve(f"m{i}", 1, nbytes, value) for i in range(count)]


def test_a_part_of_a_step_is_not_sold_for_its_share() -> None:
    """By the hull, three of the eight layers of m0 would be worth less than all layers of m1."""
    found = improve(
        Curves(steps(2)),
        np.array([1.0, 1.0]),
        [Copy(0, 0, 8)],
        np.array([5e6]),
        np.array([1.0]),
        1,
        margin=0.1,
    )
    assert found_of(found) == [(0, 0, 8)]


def test_a_fleet_of_floors_is_filled() -> None:
    copies: list[Copy] = []
    for _ in range(3):
        taken = [sum(c.layers for c in copies if c.first == d) * 1e6 for d in range(4)]
        copies = improve(
            Curves(steps(9)),
            np.linspace(1.0, 1.3, 9),
            copies,
            np.array([18e6 - each for each in taken]),
            np.full(4, 0.99),
            4,
            margin=0.1,
            moves=4,
        )
    assert len({c.model for c in copies}) == 8
    assert all(c.layers == 8 for c in copies)


def test_a_curve_stops_where_a_unit_more_is_worth_less() -> None:
    nbytes = np.array([1, 1, 2, 1, 1, 1], np.int64) * 1_000_000
    value = np.array([0.0, 1.0, 2.0, 2.0, 5.0, 5.01, 5.01])
    curve = ValueCurve("m", 1, nbytes, value)
    assert curve.knots.tolist() == [0, 4, 5]
    assert curve.stops.tolist() == [0, 2, 4, 5]
    value = np.array([0.0, 1.0, 1.001, 1.002, 2.0, 2.001, 2.002])
    small = ValueCurve("m", 1, nbytes, value)
    assert small.stops.tolist() == [0, 1, 4, 6]  # tiny gains are no stops, except the last
    nothing = ValueCurve("m", 1, nbytes, np.zeros(7))
    assert nothing.stops.tolist() == [0]


def test_what_does_not_fit_whole_comes_in_part() -> None:
    """The part with the most value per byte does not fit.

    The plan holds a smaller part, up to the stop after which another unit is worth less.
    """
    nbytes = np.full(4, 1_000_000, np.int64)
    value = np.array([0.0, 0.2, 0.4, 0.4, 1.2])
    found = improve(
        Curves([ValueCurve("m", 1, nbytes, value)]),
        np.array([1.0]),
        [],
        np.array([3e6]),
        np.array([1.0]),
        1,
        margin=0.1,
    )
    assert found_of(found) == [(0, 0, 2)]


@pytest.mark.parametrize(
    ("free", "first"),
    [
        ([6, 8, 6, 9], 3),  # none takes room of a wider copy, and the last has most
        ([9, 9, 9, 9, 6, 8, 6, 7], 5),  # on the first four, a copy of four devices would lose room
    ],
)
def test_a_new_copy_leaves_room_for_wider_ones(free: list[int], first: int) -> None:
    found = improve(
        Curves([ValueCurve("m", 1, np.array([2_000_000]), np.array([0.0, 1.0]))]),
        np.array([1.0]),
        [],
        np.array(free) * 1e6,
        np.ones(len(free)),
        4,
        margin=0.1,
        most=1,
    )
    assert found_of(found) == [(0, first, 1)]


def test_copies_on_half_filled_devices_can_be_extended() -> None:
    """A copy is held up to its floor first, and then up to its end on the same device."""
    nbytes = np.full(8, 1_000_000, np.int64)
    value = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.1, 1.2, 1.3, 1.4])
    copies = improve(
        Curves([ValueCurve(f"m{i}", 1, nbytes, value) for i in range(4)]),
        np.ones(4),
        [],
        np.full(4, 8e6),
        np.ones(4),
        4,
        margin=0.1,
        most=1,
    )
    assert sorted(found_of(copies)) == [(0, 0, 8), (1, 1, 8), (2, 2, 8), (3, 3, 8)]


def two_models(value: float) -> list[ValueCurve]:
    nbytes = np.array([10_000_000], np.int64)
    return [
        ValueCurve("held", 1, nbytes, np.array([0.0, 1.0])),
        ValueCurve("new", 1, nbytes, np.array([0.0, value])),
    ]


@pytest.mark.parametrize(("value", "stays"), [(1.05, True), (1.2, False)])
def test_what_is_there_goes_only_for_what_is_clearly_better(value: float, stays: bool) -> None:
    found = improve(
        Curves(two_models(value)),
        np.array([1.0, 1.0]),
        [Copy(0, 0, 1)],
        np.array([0.0]),
        np.array([1.0]),
        1,
        margin=0.1,
    )
    assert [c.model for c in found] == [0 if stays else 1]


def test_a_plan_that_is_in_place_moves_nothing() -> None:
    curves = Curves(two_models(0.5))
    arguments = (np.array([1.0, 1.0]), np.array([1.0, 0.9]), 1)
    first = improve(curves, arguments[0], [], np.array([15e6, 15e6]), *arguments[1:], margin=0.0)
    again = improve(curves, arguments[0], first, np.array([5e6, 5e6]), *arguments[1:], margin=0.0)
    assert found_of(again) == found_of(first)


def test_one_copy_can_take_the_room_of_a_hundred() -> None:
    """They are more than the number of exchanges and of devices."""
    small = [
        ValueCurve(f"s{i}", 1, np.array([1_000_000]), np.array([0.0, 0.01])) for i in range(100)
    ]
    large = ValueCurve("large", 1, np.array([100_000_000]), np.array([0.0, 10.0]))
    found = improve(
        Curves([*small, large]),
        np.ones(101),
        [Copy(model, 0, 1) for model in range(100)],
        np.array([0.0]),
        np.array([1.0]),
        1,
        margin=0.5,
        moves=1,
    )
    assert found_of(found) == [(100, 0, 1)]


def test_what_an_instance_uses_is_no_victim() -> None:
    found = improve(
        Curves(two_models(100.0)),
        np.array([1.0, 1.0]),
        [Copy(0, 0, 1, fixed=True)],
        np.array([0.0]),
        np.array([1.0]),
        1,
        margin=0.1,
    )
    assert [c.model for c in found] == [0]
