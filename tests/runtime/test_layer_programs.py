"""Risk: some order of prewarms, evictions, leases and cancellations hands out wrong bytes for a
leased layer, refuses layers that fit, or never ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from layer_programs import REACHED, run, run_threads
from layer_world import GRANULES, Contents, WrongBytes

STAGED_ONLY = {"copies ordered behind a layer that is still filling"}
Program = Callable[[int, Contents], Counter[str]]


@pytest.fixture(scope="module", params=sorted(GRANULES))
def contents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return Contents(tmp_path_factory.mktemp("checkpoints"), request.param)


def total(program: Program, seeds: int, contents: Contents) -> Counter[str]:
    return sum((program(seed, contents) for seed in range(seeds)), Counter())


def test_random_programs_hold_on_one_stepping_thread(contents: Contents) -> None:
    counts = total(run, 150, contents)
    places = set(REACHED) - (STAGED_ONLY if contents.device == "host" else set())
    assert not [place for place in places if counts[place] < 5], counts


def test_random_programs_hold_on_several_threads(contents: Contents) -> None:
    counts = total(run_threads, 10, contents)
    assert counts["leases, complete"]
    assert counts["leases, streaming, a layer missing"]


@pytest.mark.parametrize("program", [run, run_threads])
@pytest.mark.parametrize("device", sorted(GRANULES))
def test_the_checks_find_one_wrong_byte(device: str, program: Program, tmp_path: Path) -> None:
    contents = Contents(tmp_path, device)
    for layers in contents.layers.values():
        for i, layer in enumerate(layers):
            layers[i] = layer.copy()
            layers[i][-1:] ^= 1
    with pytest.raises(WrongBytes) as raised:
        total(program, 20, contents)
    assert raised.value.count == 1
