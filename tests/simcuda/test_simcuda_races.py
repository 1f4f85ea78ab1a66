"""Risk: the simulated driver reports a race where CUDA orders the work, or misses a race.

Each program is judged twice: by stream_programs.py, from the documented ordering and all paths
through it, and by the simulator. Both must find the same set of offending calls.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_programs import (
    GRANULE,
    Op,
    Program,
    expected_races,
    generate,
    observed_races,
    plant,
)

from warmserve_rt.testing import simulated_cuda


def judge(program: Program, clock: str = "virtual", **options: float) -> set[int]:
    """Return the races of a program, after a check that both judges agree."""
    with simulated_cuda(clock=clock, memory="64MiB", check=False, **options) as simulated:  # type: ignore[arg-type]
        observed = observed_races(simulated, program)
    expected = expected_races(program, observed.completed)
    assert (observed.races, observed.others) == (expected, []), program
    return expected


A, B = (Op("memset", stream, to=8, nbytes=8) for stream in (1, 2))
RECORD, AGAIN, WAIT = Op("record", 1), Op("record", 2), Op("wait", 2)
LEGACY = Op("memset", 0, to=8, nbytes=8)
NON_BLOCKING, BLOCKING = (("legacy", kind, kind) for kind in ("non-blocking", "blocking"))


@pytest.mark.parametrize(
    ("streams", "ops", "races"),
    [
        (NON_BLOCKING, [A, B], {1}),
        (NON_BLOCKING, [A, replace(B, to=16)], set()),
        (NON_BLOCKING, [A, replace(B, to=15, nbytes=1)], {1}),
        (NON_BLOCKING, [A, replace(B, to=GRANULE + 15, nbytes=1, alias=1)], {1}),
        (NON_BLOCKING, [A, replace(B, to=GRANULE + 16, nbytes=1, alias=1)], set()),
        (NON_BLOCKING, [A, A], set()),
        (NON_BLOCKING, [A, RECORD, WAIT, B], set()),
        (NON_BLOCKING, [RECORD, A, WAIT, B], {3}),
        (NON_BLOCKING, [A, WAIT, RECORD, B], {3}),
        (NON_BLOCKING, [A, RECORD, WAIT, AGAIN, B], set()),
        (NON_BLOCKING, [A, RECORD, AGAIN, WAIT, B], {4}),
        (NON_BLOCKING, [A, RECORD, Op("sync_event"), B], set()),
        (NON_BLOCKING, [A, Op("sync_stream", 1), B], set()),
        (NON_BLOCKING, [A, Op("sync_stream", 2), B], {2}),
        (NON_BLOCKING, [A, LEGACY, B], {1, 2}),
        (BLOCKING, [A, LEGACY, B], set()),
        (BLOCKING, [A, Op("record", 0), B], set()),  # any use of the legacy stream orders
        (BLOCKING, [A, Op("wait", 0), B], {2}),  # except a call without effect
        (BLOCKING, [A, Op("sync_all"), B], set()),
        (NON_BLOCKING, [A, Op("htod_now", 0, to=8, nbytes=1), B], {1, 2}),
        (BLOCKING, [A, Op("htod_now", 0, to=8, nbytes=1), B], set()),
    ],
)
@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_known_programs_have_their_known_races(
    streams: tuple[str, ...], ops: list[Op], races: set[int], clock: str
) -> None:
    assert judge(Program(streams, 1, tuple(ops)), clock) == races


def test_random_programs_have_the_races_of_the_model() -> None:
    paced = {"h2d": 1e5, "d2h": 1e4, "d2d": 1e6}  # so slow that queries find work in progress
    racy = sum(bool(judge(generate(seed), **(paced if seed % 2 else {}))) for seed in range(300))
    assert 200 < racy < 300  # both kinds occur


def test_race_free_programs_race_without_one_of_their_calls() -> None:
    planted = 0
    for seed in range(60):
        program = generate(seed, race_free=True)
        assert not judge(program)
        without = plant(program, seed)
        if without is not None:
            planted += bool(judge(without))
    assert planted > 40


@pytest.mark.parametrize("seed", range(10))
def test_the_found_races_do_not_depend_on_timing(seed: int) -> None:
    program = generate(seed)
    queries = any(op.kind == "query" for op in program.ops)  # their answers depend on timing
    found = [
        judge(program, "real"),
        judge(program, "virtual"),
        judge(program, "virtual", h2d=1e4, d2h=3e3, d2d=1e5),
    ]
    assert queries or found[0] == found[1] == found[2]


@settings(max_examples=100, deadline=None)
@given(st.randoms(use_true_random=False), st.integers(2, 25))
def test_small_programs_have_the_races_of_the_model(rng: random.Random, length: int) -> None:
    judge(generate(rng, length))
