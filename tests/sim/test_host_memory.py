"""Risk: simulated host memory holds more than its bytes, or evicts other layers than it should."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.host import HostMemory


def profile(width: int, *layers: int) -> ModelProfile:
    return ModelProfile("m", width, layers, 1, 0.0, 0.0, 0.01, ends=False)


MODELS = [profile(1, 3, 5, 4), profile(2, 2, 6), profile(1, 7), profile(1, 1, 1, 1, 1)]
LAYERS = [
    (model, rank, layer)
    for model, each in enumerate(MODELS)
    for rank in range(each.width)
    for layer in range(len(each.layer_bytes))
]


class PlainHostMemory:
    """The rule of eviction, layer by layer."""

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.held: set[tuple[int, int, int]] = set()
        self.values: dict[tuple[int, int], float] = {}
        self.uses = [0] * len(MODELS)
        self.clock = 0

    def nbytes(self, layers: Any) -> int:
        return sum(MODELS[model].layer_bytes[layer] for model, _, layer in layers)

    def value(self, layer: tuple[int, int, int]) -> float:
        return self.values.get((layer[0], layer[2]), 0.0)

    def touch(self, model: int) -> None:
        self.clock += 1
        self.uses[model] = self.clock

    def add(self, new: tuple[int, int, int]) -> bool:
        if new in self.held:
            return True
        left = set(self.held)
        while self.nbytes(left | {new}) > self.capacity:
            victims = [
                old
                for old in left
                if self.value(old) < self.value(new)
                or (self.value(old) == self.value(new) and old[0] != new[0])
            ]
            if not victims:
                return False
            # Models that were never used come in their order.
            left.remove(
                min(victims, key=lambda v: (self.value(v), self.uses[v[0]], -v[2], v[0], v[1]))
            )
        self.held = left | {new}
        return True


OPERATIONS = st.one_of(
    st.tuples(st.just("add"), st.sampled_from(LAYERS)),
    st.tuples(st.just("touch"), st.integers(0, len(MODELS) - 1)),
    st.tuples(
        st.just("value"),
        st.dictionaries(
            st.integers(0, len(MODELS) - 1), st.lists(st.integers(0, 3), min_size=4, max_size=4)
        ),
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 30), st.lists(OPERATIONS, max_size=40))
def test_host_memory_is_that_of_a_plain_model(capacity: int, operations: list[Any]) -> None:
    memory, plain = HostMemory(capacity, MODELS), PlainHostMemory(capacity)
    for name, what in operations:
        if name == "add":
            assert memory.add(*what) == plain.add(what)
        elif name == "touch":
            memory.touch(what)
            plain.touch(what)
        else:
            values = {m: np.array(v[: len(MODELS[m].layer_bytes)], float) for m, v in what.items()}
            missing = memory.value(values)
            plain.values = {
                (m, layer): value for m, each in values.items() for layer, value in enumerate(each)
            }
            worth = [plain.value(each) for each in missing]
            assert worth == sorted(worth, reverse=True)
            assert set(missing) == {x for x in LAYERS if plain.value(x) > 0} - plain.held
        assert {each for each in LAYERS if memory.holds(*each)} == plain.held
        assert memory.held_bytes == plain.nbytes(plain.held) <= capacity
        for model, each in enumerate(MODELS):
            count = len(each.layer_bytes)
            assert memory.held(model) == [
                all((model, rank, layer) in plain.held for rank in range(each.width))
                for layer in range(count)
            ]
            assert (model in memory) == any(x[0] == model for x in plain.held)


def test_without_values_the_least_recently_used_model_is_evicted() -> None:
    memory = HostMemory(25, [profile(1, *(1,) * 10) for _ in range(3)])
    for model in (0, 1):
        memory.touch(model)
        for layer in range(10):
            memory.add(model, 0, layer)
    memory.touch(0)
    memory.touch(2)
    for layer in range(10):
        memory.add(2, 0, layer)
    assert memory.held(0) == memory.held(2) == [True] * 10
    assert memory.held(1) == [True] * 5 + [False] * 5  # its last layers are evicted first


def test_a_model_larger_than_host_memory_keeps_its_first_layers() -> None:
    memory = HostMemory(4, [profile(1, *(1,) * 10)])
    assert [memory.add(0, 0, layer) for layer in range(10)] == [True] * 4 + [False] * 6


def test_infinite_host_memory_holds_every_layer() -> None:
    memory = HostMemory(float("inf"), MODELS)
    assert all(memory.holds(*layer) for layer in LAYERS)
    assert memory.value({0: np.ones(3)}) == []
