"""Risk: some order of prewarms, evictions, leases and cancellations hands out other bytes than the
leased layer's, refuses what fits, or never ends."""

from __future__ import annotations

from collections import Counter

import pytest
from layer_programs import REACHED, run, run_threads
from layer_world import GRANULES, Contents

HOST_ONLY_STAGED = {"copies behind a layer that still fills"}  # else what is there was written


@pytest.fixture(scope="module", params=sorted(GRANULES))
def contents(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Contents:
    return Contents(tmp_path_factory.mktemp("checkpoints"), request.param)


def test_one_thread_that_steps(contents: Contents) -> None:
    counts: Counter[str] = Counter()
    for seed in range(150):
        counts += run(seed, contents)
    places = set(REACHED) - (HOST_ONLY_STAGED if contents.device == "host" else set())
    assert not [place for place in places if counts[place] < 5], counts


def test_several_threads(contents: Contents) -> None:
    counts: Counter[str] = Counter()
    for seed in range(10):
        counts += run_threads(seed, contents)
    assert counts["leases, complete"]
    assert counts["leases, streaming, a layer not there"]
