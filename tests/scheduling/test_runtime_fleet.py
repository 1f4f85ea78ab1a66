"""Risk: a plan is not carried out: other layers are loaded or evicted, a failure ends the planning,
or the scheduler does not see what the runtime holds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GRANULE, write_model
from conftest import Device
from polled_fleet import Clock, PolledFleet

from warmserve_rt import Runtime, testing
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.device import BACKOFF_S
from warmserve_rt.scheduling.fleet import RuntimeFleet
from warmserve_rt.scheduling.loop import RETRY_S, Loop
from warmserve_rt.scheduling.registered_models import profile_of
from warmserve_rt.scheduling.scheduler import Scheduler

SIZES = {name: [GRANULE, GRANULE, GRANULE - 5, 100] for name in "abc"}
BANDWIDTH = 4.0 * GRANULE  # a quarter of a second for a layer
SERVICE = [1.0] * len(SIZES)


class World(PolledFleet):
    """Hold runtimes of six granules without threads, three models of four, and a manual clock."""

    def __init__(self, folder: Path, count: int = 1, *, width: int = 1, **options: Any) -> None:
        self.clock = Clock()
        self.watched = [testing.watch(pump=True) for _ in range(count)]
        self.runtimes = [
            Runtime(
                driver=watched.driver,
                arena=6 * GRANULE,
                staging=4 * GRANULE,
                chunk=GRANULE,
                pump=True,
                tensors="numpy",
            )
            for watched in self.watched
        ]
        for name, sizes in SIZES.items():
            path = write_model(folder / name, name, sizes)
            for runtime in self.runtimes:
                runtime.register(name, path)
        self.fleet = RuntimeFleet(
            self.runtimes,
            [self.profile(name, width) for name in SIZES],
            bandwidth=BANDWIDTH,
            clock=self.clock,
            **options,
        )

    def profile(self, name: str, width: int = 1) -> ModelProfile:
        return profile_of(
            self.runtimes[0].model(name),
            prefill_s=0.1,
            prefill_token_s=0.0,
            decode_s=0.01,
            width=width,
        )

    def begin(self, *, models: int = len(SIZES), **options: Any) -> Scheduler:
        scheduler = Scheduler(**options)
        self.fleet.begin(scheduler, Forecaster(models), SERVICE[:1] * models)
        return scheduler

    def held(self, device: int = 0) -> dict[str, list[int]]:
        """Return the resident layers of each model that has any."""
        models = self.runtimes[device].snapshot().models
        found = {
            name: [i for i, layer in enumerate(state.layers) if layer.residency == "resident"]
            for name, state in models.items()
        }
        return {name: layers for name, layers in found.items() if layers}

    def finish(self) -> None:
        self.fleet.close()
        for runtime, watched in zip(self.runtimes, self.watched, strict=True):
            runtime.check_invariants()
            runtime.close()
            watched.check()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.finish()


def test_layers_outside_of_the_plan_lose_the_keep_values_that_a_caller_gave(world: World) -> None:
    runtime = world.runtimes[0]
    runtime.prewarm("a").wait()
    runtime.set_keep_value("a", 5.0)
    world.begin(recent=1.0, memory=1e6)
    world.ask("b", 8)
    world.settle()
    assert {layer.keep_value for layer in runtime.snapshot().models["a"].layers} == {0.0}
    assert world.held()["b"] == [0, 1, 2, 3]


def test_models_with_more_requests_get_more_layers(world: World) -> None:
    world.begin()
    world.settle()
    assert world.held() == {}  # no requests, no loads
    world.ask("a", 8)
    world.ask("b", 2)
    world.settle()
    assert world.held() == {"a": [0, 1, 2, 3], "b": [0, 1]}


def test_layers_of_less_value_are_evicted_when_demand_changes(world: World) -> None:
    world.begin(memory=10.0, recent=1.0)
    world.ask("a", 8)
    world.settle()
    assert world.held() == {"a": [0, 1, 2, 3]}
    world.clock.now += 60.0
    world.ask("c", 8)
    world.settle()
    assert world.held() == {"a": [0, 1], "c": [0, 1, 2, 3]}
    models = world.runtimes[0].snapshot().models
    worth = {name: [x.keep_value for x in state.layers] for name, state in models.items()}
    assert worth["c"] == sorted(worth["c"], reverse=True)  # the tail is evicted first
    assert min(worth["c"]) > worth["a"][0]


def test_layers_beyond_the_plan_are_evicted_first(world: World) -> None:
    """This holds also for a model without requests, whose first layers stay useful longer."""
    world.runtimes[0].prewarm("b").wait(5)
    world.begin()
    world.settle()
    keep = [x.keep_value for x in world.runtimes[0].snapshot().models["b"].layers]
    assert keep == sorted(keep, reverse=True)
    assert keep[0] == 0
    world.ask("a", 8)
    world.settle()
    assert world.held() == {"a": [0, 1, 2, 3], "b": [0, 1]}


def test_a_plan_never_evicts_leased_layers(world: World) -> None:
    scheduler = world.begin(recent=1.0, memory=10.0)
    with world.runtimes[0].lease("b"):
        world.ask("a", 50)
        world.settle()
        # The lease leaves two granules, and the scheduler plans at most two.
        assert world.held() == {"a": [0, 1], "b": [0, 1, 2, 3]}
        assert {(copy.model, copy.layers) for copy in scheduler.held} == {(0, 2), (1, 4)}
    world.settle()
    assert world.held()["a"] == [0, 1, 2, 3]
    assert not world.fleet.errors


def test_leased_layers_beyond_the_leading_ones_are_not_free_room(world: World) -> None:
    device = world.fleet.devices[0]
    with world.runtimes[0].lease("b", layers=[2, 3]):
        device.refresh()
        assert device.room == 4 * GRANULE
        assert device.shards == {}
    device.refresh()
    assert device.room == 6 * GRANULE


def test_loading_layers_count_once(world: World) -> None:
    world.begin()
    world.ask("a", 8)
    world.plan()
    assert world.runtimes[0].step()  # the first chunk; nearly all bytes are still missing
    device = world.fleet.devices[0]
    device.refresh()
    shard = device.shards[0, 0]
    assert (shard.layers, shard.goal) in ((0, 4), (1, 4))
    asked = []
    prewarm = world.runtimes[0].prewarm
    world.runtimes[0].prewarm = lambda *a, **k: asked.append(a) or prewarm(*a, **k)  # type: ignore
    world.plan()
    assert asked == []
    world.settle()
    assert world.held() == {"a": [0, 1, 2, 3]}


def test_a_load_that_is_no_longer_planned_is_cancelled(world: World) -> None:
    world.begin(recent=1.0, memory=5.0)
    world.ask("a", 8)
    world.plan()
    world.clock.now += 120.0
    world.ask("b", 8)
    world.ask("c", 8)
    world.settle()
    held = world.held()
    assert "a" not in held, held
    assert sum(map(len, held.values())) == 6


def test_a_dry_run_explains_its_plan_and_does_nothing(world: World) -> None:
    scheduler = world.begin(dry_run=True)
    world.ask("a", 8)
    world.ask("b", 2)
    world.settle()
    assert world.held() == {}
    said = scheduler.explain()
    assert any(each.startswith("keeps 4 of 4 layers of a on device 0: ") for each in said), said
    assert any(" of b" in each for each in said), said
    keep = {x.keep_value for m in world.runtimes[0].snapshot().models.values() for x in m.layers}
    assert keep == {0.0}


def test_a_model_is_held_on_another_device_if_one_is_busy(tmp_path: Path) -> None:
    world = World(tmp_path, 2, exclusive=True)
    world.begin(busy_memory=1.0)
    with world.runtimes[0].lease("a"):
        world.ask("b", 8)
        for _ in range(5):
            world.settle()
        assert world.held(1)["b"] == [0, 1, 2, 3]
    world.finish()


def test_a_model_two_devices_wide_is_loaded_on_both(tmp_path: Path) -> None:
    world = World(tmp_path, 2, width=2)
    world.begin()
    world.ask("a", 8)
    world.settle()
    assert world.held(0) == world.held(1) == {"a": [0, 1, 2, 3]}
    assert set(world.fleet.devices[1].shards) == {(0, 1)}
    world.finish()


def test_a_lease_occupies_an_exclusive_device(tmp_path: Path) -> None:
    world = World(tmp_path, exclusive=True)
    device = world.fleet.devices[0]
    assert device.occupants == {}
    with world.runtimes[0].lease("b"):
        device.refresh()
        assert device.occupants == {(1, 0): True}
        assert device.room == 2 * GRANULE
    world.finish()


def test_a_failed_load_is_reported_and_repeated_later(world: World) -> None:
    world.begin(recent=1.0, memory=1e6)
    world.ask("a", 8)
    world.watched[0].faults.arm([(0, None)])
    world.settle()
    world.settle(1.0)
    assert world.held() == {}
    assert len(world.fleet.errors) == 1  # not one error for each plan
    world.watched[0].faults.disarm()
    world.settle(BACKOFF_S + 1.0)
    world.settle(1.0)
    assert world.held() == {"a": [0, 1, 2, 3]}


def test_a_changed_file_does_not_stop_the_planning(world: World, tmp_path: Path) -> None:
    world.begin(recent=1.0, memory=1e6)
    write_model(tmp_path / "a", "a", SIZES["a"], revision=1)
    world.ask("a", 8)
    world.settle()
    world.settle(1.0)
    world.ask("b", 80)
    world.settle()
    world.settle(1.0)
    assert [type(error).__name__ for error in world.fleet.errors] == ["CorruptCheckpoint"]
    assert world.held() == {"b": [0, 1, 2, 3]}


def test_a_scheduler_that_raises_is_asked_again(world: World) -> None:
    scheduler = world.begin()
    plan = scheduler.plan
    bad: list[Any] = [True]

    def sometimes() -> None:
        if bad:
            bad.clear()
            raise RuntimeError("no plan")
        plan()

    scheduler.plan = sometimes  # type: ignore[method-assign]
    world.ask("a", 8)
    world.settle()
    assert [str(error) for error in world.fleet.errors] == ["no plan"]
    world.settle(RETRY_S)
    assert world.held() == {"a": [0, 1, 2, 3]}


def test_close_cancels_the_fleet_s_loads(world: World) -> None:
    world.begin()
    world.ask("a", 8)
    world.plan()
    world.fleet.close()
    world.fleet.close()
    while world.runtimes[0].step():
        pass
    assert world.held() == {}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"runtimes": []}, "must have runtimes"),
        ({"profiles": []}, "and models"),
        ({"bandwidth": 0.0}, "bandwidth must be positive and finite bytes per second, got 0.0"),
        (
            {"bandwidth": float("nan")},
            "bandwidth must be positive and finite bytes per second, got nan",
        ),
        ({"profiles": ["a", "a"]}, "one name"),
        ({"width": 2}, "a needs 2 devices"),
        ({"rename": "z"}, "'z'"),
        ({"layers": 5}, "a has 4 layers on device 0, and 5"),
    ],
)
def test_invalid_fleets_are_refused(world: World, options: dict[str, Any], problem: str) -> None:
    profiles = [world.profile(n, options.get("width", 1)) for n in options.get("profiles", "a")]
    if "rename" in options or "layers" in options:
        profiles = [
            ModelProfile(options.get("rename", "a"), 1, (1,) * options.get("layers", 4), 0, 1, 0, 1)
        ]
    with pytest.raises(ValueError, match=problem):
        RuntimeFleet(
            options.get("runtimes", world.runtimes),
            profiles,
            bandwidth=options.get("bandwidth", 1.0),
        )


def test_invalid_events_are_refused(world: World) -> None:
    world.begin()
    with pytest.raises(ValueError, match="'z' has no profile: the fleet has a, b, c"):
        world.fleet.arrived("z", 1)
    with pytest.raises(ValueError, match="'a' has no request in progress that could end"):
        world.fleet.finished("a")
    with pytest.raises(ValueError, match="has a scheduler"):
        world.begin()


# The loop.


def test_calls_run_in_order_and_poll_returns_the_next_time() -> None:
    clock, made = Clock(), []
    loop = Loop(clock, pytest.fail)
    assert loop.poll() is None
    loop.after(2.0, lambda: made.append(2))
    loop.after(1.0, lambda: made.append(1))
    loop.post(lambda: made.append(0))
    assert loop.poll() == 1.0
    clock.now += 5.0
    assert loop.poll() is None
    assert made == [0, 1, 2]


def test_a_timer_that_raises_is_repeated_but_a_posted_call_is_not() -> None:
    clock, errors = Clock(), []
    loop = Loop(clock, errors.append)
    loop.post(lambda: [].pop())
    loop.after(0.0, lambda: [].pop())
    assert loop.poll() == RETRY_S
    assert len(errors) == 2
    clock.now += RETRY_S
    assert loop.poll() == RETRY_S
    assert len(errors) == 3


def test_the_thread_wakes_for_an_earlier_call_and_ends_at_close() -> None:
    before = threading.active_count()
    loop = Loop(time.monotonic, pytest.fail)
    loop.after(3600.0, lambda: None)
    loop.start()
    time.sleep(0.02)
    done = threading.Event()
    loop.after(0.01, done.set)
    assert done.wait(5)
    with pytest.raises(ValueError, match="started before"):
        loop.start()
    loop.close()
    loop.close()
    assert threading.active_count() == before
    loop.after(0.0, lambda: pytest.fail("it is closed"))
    assert loop.poll() is None


def test_the_fleet_s_own_thread_prewarms(device: Device, tmp_path: Path) -> None:
    """Use every kind of device, with the runtime's own loaders."""
    runtime = device.runtime(arena=6 * GRANULE)
    for name, sizes in SIZES.items():
        runtime.register(name, write_model(tmp_path / name, name, sizes))
    times = {"prefill_s": 0.1, "prefill_token_s": 0.0, "decode_s": 0.01}
    profiles = [profile_of(runtime.model(name), **times) for name in SIZES]
    before = threading.active_count()
    with RuntimeFleet([runtime], profiles, bandwidth=BANDWIDTH) as fleet:
        fleet.begin(Scheduler(), Forecaster(len(SIZES)), SERVICE)
        fleet.start()
        for _ in range(8):
            fleet.arrived("b", 128)
            fleet.finished("b")
        until = time.monotonic() + 20
        while not runtime.snapshot().models["b"].resident:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert threading.active_count() == before
    assert not fleet.errors
