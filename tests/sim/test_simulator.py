"""Risk: the simulator flatters a policy: first tokens come before their bytes can arrive, or before
the prefills and decode steps that they need."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sim_checks import SMALL, Scripted, run, tiny, workload

from warmserve_rt.policy.pipeline import first_token
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload import catalogue

ONE = Hardware(devices=1, node_devices=1, background_share=0.0)


# (a) Streaming starts.


def stepped(loads: list[float], computes: list[float], resident: int) -> float:
    """Return the time of a start's first token, computed layer by layer."""
    link = done = 0.0
    for layer, (load, compute) in enumerate(zip(loads, computes, strict=True)):
        if layer >= resident:
            link += load
            done = max(done, link)
        done += compute
    return done


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.integers(1, 10**9), min_size=3, max_size=40),
    ends=st.booleans(),
    prompt=st.integers(1, 4000),
    bandwidth=st.floats(1e8, 1e11),
    prefill=st.tuples(st.floats(0, 0.5), st.floats(0, 1e-3)),
    width=st.sampled_from([1, 2, 4]),
    switch=st.floats(0, 1),
    data=st.data(),
)
def test_a_streaming_start_matches_the_layer_pipeline(
    layers: list[int],
    ends: bool,
    prompt: int,
    bandwidth: float,
    prefill: tuple[float, float],
    width: int,
    switch: float,
    data: st.DataObject,
) -> None:
    profile = ModelProfile("m", width, tuple(layers), 1, *prefill, 0.01, ends=ends)
    held = data.draw(st.lists(st.integers(0, len(layers)), min_size=width, max_size=width))
    hardware = Hardware(width, width, 72e9, bandwidth)

    def prewarm(fleet: Fleet) -> None:
        for rank, (device, count) in enumerate(zip(fleet.devices, held, strict=True)):
            if count:
                assert fleet.memory.prewarm(device, 0, rank, count)

    begin = sum(layers) / bandwidth + 1.0
    script = Scripted((-50.0, prewarm), (begin, lambda fleet: fleet.start(0, fleet.devices)))
    fleet, _ = run(workload([profile], [(begin, 0, prompt, 1)]), hardware, script,
                   streaming=True, elastic_kv=True, switch_s=switch)  # fmt: skip
    # Only layers on every device count as resident: the slowest device has the fewest.
    loads, computes = (
        [size / bandwidth for size in layers],
        profile.compute(profile.prefill(prompt)),
    )
    wait = fleet.first_token[0] - begin - switch
    expected = first_token(loads, computes, min(held))
    assert wait == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert wait == pytest.approx(stepped(loads, list(computes), min(held)), rel=1e-9, abs=1e-6)
    assert fleet.start_hits == sum(held)


@settings(max_examples=60, deadline=None)
@given(
    layers=st.lists(st.integers(1, 100), min_size=1, max_size=6),
    requests=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 60)), min_size=1, max_size=4),
    resident=st.integers(0, 6),
)
def test_streamed_prefills_leave_no_device_idle_while_it_has_work(
    layers: list[int], requests: list[tuple[int, int]], resident: int
) -> None:
    """Compare with a device that gives each tick to the first request with work on a loaded layer.

    One byte arrives each tick, and each layer of a request takes whole ticks.
    """
    requests.sort()
    resident = min(resident, len(layers))
    profile = ModelProfile("m", 1, tuple(layers), 0, 0.0, float(len(layers)), 1.0, ends=False)
    hardware = Hardware(1, 1, 1e4, 1.0, background_share=0.0)
    load = sum(layers[resident:])
    served = [(float(time), 0, ticks, 1) for time, ticks in requests if time <= load]
    if not served:
        return

    def prepare(fleet: Fleet) -> None:
        if resident:
            shard = fleet.memory._shard(fleet.devices[0], 0, 0)
            fleet.memory._resize(fleet.devices[0], shard, fleet.memory.ends[0][resident - 1])
            shard.resident = shard.target

    script = Scripted((-1.0, prepare), (0.0, lambda fleet: fleet.start(0, fleet.devices)))
    fleet, _ = run(workload([profile], served), hardware, script, observe=False,
                   streaming=True, elastic_kv=True, switch_s=0.0)  # fmt: skip
    come = [0] * resident + list(itertools.accumulate(layers[resident:]))
    left = [[ticks] * len(layers) for _, _, ticks, _ in served]
    ends: list[int | None] = [None] * len(served)
    for now in itertools.count():
        for i, (time, *_) in enumerate(served):
            if ends[i] is None and time <= now and come[-1] <= now and not sum(left[i]):
                ends[i] = now
        if None not in ends:
            break
        for i, (time, *_) in enumerate(served):
            layer = next((j for j, ticks in enumerate(left[i]) if ticks), None)
            if time <= now and layer is not None and come[layer] <= now:
                left[i][layer] -= 1
                break
    # First tokens are reported in the order of requests.
    ordered = list(itertools.accumulate(ends, max))  # type: ignore[arg-type]
    assert fleet.first_token == pytest.approx(ordered)


# (b), (c) Known times.


@pytest.mark.parametrize(
    ("name", "seconds"), [("llama2-7b", 0.3922), ("llama2-13b", 0.379), ("llama2-70b", 1.004)]
)
def test_a_cold_start_takes_bytes_over_bandwidth(name: str, seconds: float) -> None:
    model = catalogue.model(name)
    hardware = Hardware(model.width, model.width, bandwidth=32 * 2**30)
    script = Scripted((0.0, lambda fleet: fleet.start(0, fleet.devices)))
    fleet, _ = run(workload([model], [(0.0, 0, 500, 20)]), hardware, script, switch_s=0.01)
    assert fleet.first_token[0] == pytest.approx(seconds + 0.01 + model.prefill(500), abs=2e-3)
    assert fleet.finished[0] - fleet.first_token[0] == pytest.approx(19 * model.decode(1), rel=1e-6)
    assert fleet.start_hits == fleet.memory.wasted_bytes == 0
    assert fleet.links.loaded_bytes == pytest.approx(model.nbytes * model.width)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_warm_start_takes_the_switch_and_the_prefill(streaming: bool) -> None:
    model = catalogue.model("llama2-70b")
    layers = len(model.layer_bytes)

    def prewarm(fleet: Fleet) -> None:
        for rank, device in enumerate(fleet.devices):
            assert fleet.memory.prewarm(device, 0, rank, layers)

    script = Scripted((-50.0, prewarm), (5.0, lambda fleet: fleet.start(0, fleet.devices)))
    fleet, _ = run(workload([model], [(5.0, 0, 500, 2)]), Hardware(4, 4), script,
                   streaming=streaming, switch_s=0.01, engine_start_s=0.5)  # fmt: skip
    assert fleet.first_token[0] == pytest.approx(5.0 + 0.51 + model.prefill(500), rel=1e-12)
    assert fleet.start_hits == fleet.start_layers == 4 * layers
    assert fleet.memory.wasted_bytes == 0


def test_a_start_takes_over_loads_in_progress() -> None:
    """No byte arrives sooner than the link carries it, arrives twice, or counts as wasted."""
    model = tiny(layers=(100,) * 10)
    script = Scripted(
        (0.0, lambda fleet: fleet.memory.prewarm(fleet.devices[0], 0, 0, 4)),
        (2.5, lambda fleet: fleet.start(0, fleet.devices)),
        (30.0, lambda fleet: fleet.stop(fleet.instances[0][0])),
    )
    hardware = Hardware(1, 1, 2000, 100.0)
    fleet, accounts = run(workload([model], [(2.5, 0, 10, 1), (40.0, 0, 1, 1)]), hardware,
                       and_again(script, 40.0), switch_s=0.25)  # fmt: skip
    assert fleet.first_token[0] == pytest.approx(10.0 + model.prefill(10))
    assert fleet.start_hits == 2 + 10  # two and a half layers had arrived
    assert fleet.links.loaded_bytes == pytest.approx(1000)
    assert fleet.memory.wasted_bytes == 0
    assert accounts.busy == pytest.approx(27.5 + fleet.now - 40.0)


def and_again(script: Scripted, time: float) -> Scripted:
    return Scripted(*script.steps, (time, lambda fleet: fleet.start(0, fleet.devices)))


# Decoding.


def test_fluid_decoding_differs_from_stepwise_decoding_by_at_most_one_step() -> None:
    """The fluid simulation starts a prefill up to one step earlier than the stepwise one.

    A fluid prefill does not wait for the end of a decode step. Both simulations do the same work,
    so the differences do not add up. If one reaches a last token just before a prefill and the
    other just after it, their times also differ by that prefill.
    """
    rng = np.random.default_rng(5)
    model = replace(catalogue.model("llama2-7b"), decode_request_s=2e-4, batch=1000)
    times = np.cumsum(rng.exponential(0.35, 1000))
    rows = [(float(t), 0, int(rng.integers(1, 1024)), int(rng.geometric(1 / 150))) for t in times]
    script = Scripted((-10.0, lambda fleet: fleet.start(0, fleet.devices)))
    hardware = replace(ONE, memory=1e15)
    fleet, _ = run(workload([model], rows), hardware, script, observe=False)
    seconds = np.array([model.prefill(prompt) for _, _, prompt, _ in rows])
    first, finished, longest, largest = in_steps(model, rows)
    assert largest > 12  # decoding was batched
    late = first - fleet.first_token
    assert late.min() >= -1e-9
    assert late.max() <= longest
    for request, (fluid, steps) in enumerate(zip(fleet.finished, finished, strict=True)):
        later = first if steps > fluid else fleet.first_token
        begin, end = min(fluid, steps), max(fluid, steps)
        prefills = np.minimum(end, later) - np.maximum(begin, later - seconds)
        assert end - begin - prefills[prefills > 0].sum() <= longest, request
    assert np.mean(abs(fleet.finished - finished) > longest) < 0.05


def in_steps(model: ModelProfile, rows: list[Any]) -> tuple[Any, Any, float, int]:
    """Simulate stepwise: prefills first, one by one; then a step with a token for each request.

    Return the times of first and last tokens, the longest step and the largest batch.
    """
    coming, queue, now = deque(enumerate(rows)), deque[int](), 0.0
    left: dict[int, int] = {}
    first, finished = np.zeros(len(rows)), np.zeros(len(rows))
    longest, largest = 0.0, 0
    while coming or queue or left:
        while coming and coming[0][1][0] <= now:
            queue.append(coming.popleft()[0])
        if queue:
            request = queue.popleft()
            now += model.prefill(rows[request][2])
            first[request] = finished[request] = now
            if rows[request][3] > 1:
                left[request] = rows[request][3] - 1
        elif left:
            now += (step := model.decode(len(left)))
            longest, largest = max(longest, step), max(largest, len(left))
            for request in list(left):
                left[request] -= 1
                if not left[request]:
                    finished[request] = now
                    del left[request]
        else:
            now = coming[0][1][0]
    return first, finished, longest, largest


def test_an_instance_stopped_in_a_callback_gives_no_further_callbacks() -> None:
    class StopAtOnce(Scripted):
        idles = 0

        def loaded(self, instance: Any) -> None:
            super().loaded(instance)
            if not instance.request_count:
                self.fleet.stop(instance)

        def finished(self, instance: Any, request: int) -> None:
            if not instance.request_count:
                self.fleet.stop(instance)

        def idle(self, instance: Any) -> None:
            self.idles += 1

    script = StopAtOnce(*[(t, lambda fleet: fleet.start(0, fleet.devices)) for t in (0.0, 100.0)])
    run(workload([tiny()], [(50.0, 0, 1, 1), (60.0, 0, 1, 5)]), replace(ONE, bandwidth=1e4), script)
    assert script.idles == 0


def test_a_request_larger_than_any_cache_is_served_alone() -> None:
    script = Scripted((0.0, lambda fleet: fleet.start(0, fleet.devices)))
    rows = [(60.0, 0, 900, 5), (60.0, 0, 900, 5), (61.0, 0, 5, 5)]
    fleet, _ = run(workload([tiny()], rows), Hardware(1, 1, 1000.0, 100.0), script)
    assert np.all(np.diff(fleet.first_token) > 0)
    assert fleet.first_token[1] > fleet.finished[0]


def test_events_of_equal_times_fire_in_the_order_of_scheduling() -> None:
    fleet = Fleet(workload([SMALL], []), ONE, Scripted())
    seen: list[int] = []
    for i in range(50):
        fleet.after(1.0 if i % 2 else 0.5, lambda i=i: seen.append(i))  # type: ignore[misc]
    fleet.clock.run(2.0)
    assert seen == [*range(0, 50, 2), *range(1, 50, 2)]
    assert heapq.nsmallest(1, fleet.clock._heap) == []
