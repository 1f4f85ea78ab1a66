"""Risk: a tier holds more than its bytes, or layers of less value than others that it leaves."""

from __future__ import annotations

from itertools import chain, combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.policy.tier import fill_tier

LAYER = st.tuples(st.integers(0, 9), st.integers(1, 5), st.booleans())  # density, bytes, held
MODELS = st.lists(st.lists(LAYER, min_size=1, max_size=4), max_size=3)


def filled(
    models: list[list[tuple[int, int, bool]]], room: int, margin: float = 0.0
) -> list[tuple[int, int]]:
    """Return the model and the layer of each layer that the tier holds."""
    chosen = fill_tier(
        [np.array([density for density, _, _ in model], float) for model in models],
        [np.array([nbytes for _, nbytes, _ in model]) for model in models],
        [[held for _, _, held in model] for model in models],
        room,
        margin=margin,
    )
    assert [len(each) for each in chosen] == [len(model) for model in models]
    return [(m, int(i)) for m, each in enumerate(chosen) for i in np.flatnonzero(each)]


@settings(max_examples=300, deadline=None)
@given(MODELS, st.integers(0, 30))
def test_a_tier_is_filled_nearly_as_well_as_possible(
    models: list[list[tuple[int, int, bool]]], room: int
) -> None:
    layers = [(m, i) for m, model in enumerate(models) for i in range(len(model))]

    def total(part: list[tuple[int, int]], of: int) -> int:
        return sum(models[m][i][1] * (models[m][i][0] if of else 1) for m, i in part)

    subsets = chain.from_iterable(combinations(layers, n) for n in range(len(layers) + 1))
    best = max(total(list(part), 1) for part in subsets if total(list(part), 0) <= room)
    found = filled(models, room)
    assert total(found, 0) <= room
    assert all(models[m][i][0] > 0 for m, i in found)
    largest = max((total([layer], 1) for layer in layers), default=0)
    assert best - largest <= total(found, 1) <= best
    if len({models[m][i][1] for m, i in layers}) == 1:
        assert total(found, 1) == best


def test_a_layer_that_is_held_stays_unless_another_is_worth_clearly_more() -> None:
    for density, takes in ((14, False), (16, True)):
        found = filled([[(10, 1, True)], [(density, 1, False)]], 1, margin=0.5)
        assert found == ([(1, 0)] if takes else [(0, 0)])


def test_a_layer_that_does_not_fit_leaves_its_room_to_smaller_ones() -> None:
    assert filled([[(9, 4, False), (8, 5, False), (1, 2, False)]], 6) == [(0, 0), (0, 2)]


def test_an_infinite_tier_holds_every_layer_that_saves_time() -> None:
    models = [[(1, 4, False), (0, 5, True)], [(2, 1, True)]]
    assert filled(models, 10**9) == [(0, 0), (1, 0)]
    assert fill_tier([], [], [], float("inf"), margin=0.0) == []
