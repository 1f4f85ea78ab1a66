"""A start on the wrong devices is late itself, or delays other starts."""

from __future__ import annotations

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.policy.placement import Start, groups, start_group

NODE, DEVICES = 4, 8
WAIT = 3.0


@st.composite
def starts(draw: st.DrawFn, need: float | None = None) -> Start:
    cold = draw(st.floats(0.1, 2.0))
    seconds = [draw(st.sampled_from([0.0, cold / 2, cold])) for _ in range(DEVICES)]
    chance = draw(st.floats(0.0, 1.0)) if need is None else need
    return Start(chance, draw(st.sampled_from([1, 2, 4])), cold, seconds)


def ready(start: Start, group: tuple[int, ...]) -> float:
    """Return the seconds of the slowest device.

    The layers on device d help only as rank ``d % start.width``; as any other rank it starts cold.
    """
    return max(
        start.seconds[d] if d % start.width == rank else start.cold for rank, d in enumerate(group)
    )


def everything(start: Start, free: set[int]) -> list[tuple[int, ...]]:
    return [
        group
        for first in range(0, DEVICES, NODE)
        for group in permutations([d for d in range(first, first + NODE) if d in free], start.width)
    ]


def mask(devices: set[int]) -> int:
    return sum(1 << d for d in devices)


@settings(deadline=None)
@given(starts(), st.sets(st.integers(0, DEVICES - 1)))
def test_the_cost_is_that_of_the_best_group_of_all(start: Start, free: set[int]) -> None:
    every = [ready(start, group) for group in everything(start, free)]
    wanted = min(every, default=start.cold + WAIT)
    assert start.cost(mask(free), NODE, WAIT) == pytest.approx(wanted)


@settings(deadline=None)
@given(starts(), st.sets(st.integers(0, DEVICES - 1)))
def test_groups_are_possible_and_the_best_is_among_them(start: Start, free: set[int]) -> None:
    found = list(groups(start, mask(free), NODE))
    possible = set(everything(start, free))
    for seconds, group in found:
        assert group in possible
        assert seconds == pytest.approx(ready(start, group))
    assert bool(found) == bool(possible)
    if found:
        assert min(found)[0] == pytest.approx(min(ready(start, group) for group in possible))


@settings(deadline=None)
@given(starts(1.0), st.sets(st.integers(0, DEVICES - 1)), st.lists(starts(), max_size=3))
def test_the_chosen_group_minimises_the_total_cost(
    start: Start, free: set[int], rivals: list[Start]
) -> None:
    def cost(seconds: float, group: tuple[int, ...]) -> float:
        left = free - set(group)
        return seconds + sum(
            rival.need * (rival.cost(mask(left), NODE, WAIT) - rival.cost(mask(free), NODE, WAIT))
            for rival in rivals
        )

    found = start_group(start, mask(free), NODE, rivals, WAIT)
    among = list(groups(start, mask(free), NODE))
    if found is None:
        assert not among
    else:
        assert cost(ready(start, found), found) == pytest.approx(min(cost(*g) for g in among))


def test_a_start_spares_devices_that_hold_layers_of_others() -> None:
    start = Start(1.0, 1, 1.0, [1.0] * NODE)
    rival = Start(0.5, 1, 2.0, [0.0, 2.0, 2.0, 2.0])
    assert start_group(start, 0b1111, NODE, [rival], WAIT) == (1,)


def test_any_devices_are_better_than_none() -> None:
    start = Start(1.0, 2, 1.0, [0.0] * NODE)
    found = start_group(start, 0b1010, NODE, [], WAIT)  # both help only as the second rank
    assert found is not None
    assert sorted(found) == [1, 3]
    assert start_group(start, 0b0010, NODE, [], WAIT) is None
