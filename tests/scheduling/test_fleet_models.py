"""Risk: promoting, unregistering, adding or removing a model stops a fleet, or the fleet keeps
memory for a model that traffic no longer uses."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GRANULE, write_model
from test_runtime_fleet import SIZES, World

from warmserve_rt import Runtime
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.scheduling.fleet import RuntimeFleet
from warmserve_rt.scheduling.registered_models import profile_of
from warmserve_rt.scheduling.scheduler import REST, Scheduler

TIMES: dict[str, Any] = {"prefill_s": 0.1, "prefill_token_s": 0.0, "decode_s": 0.01}
ALL = [0, 1, 2, 3]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.finish()


def register(world: World, folder: Path, name: str, sizes: list[int] | None = None) -> None:
    path = write_model(folder / f"{name}-new", name, sizes or SIZES["a"])
    for runtime in world.runtimes:
        runtime.register(name, path)


def test_a_promoted_revision_is_loaded_and_the_old_one_gives_way(
    world: World, tmp_path: Path
) -> None:
    world.begin(recent=1.0, memory=1e6)
    world.ask("a", 8)
    world.settle()
    register(world, tmp_path, "a@2")
    old = world.runtimes[0].promote("a@2")
    assert old is not None
    world.ask("a", 8)
    world.settle()
    world.settle()
    assert world.held() == {"a": [0, 1], "a@2": ALL}
    keep = [layer.keep_value for layer in world.runtimes[0].snapshot().models["a"].layers]
    assert max(keep) <= 0
    world.runtimes[0].unregister(old)
    world.settle()
    assert world.held() == {"a@2": ALL}
    assert not world.fleet.errors


def test_a_promotion_without_traffic_is_followed(world: World, tmp_path: Path) -> None:
    scheduler = world.begin(recent=1.0, memory=1e6)
    world.ask("a", 8)
    world.settle()
    register(world, tmp_path, "a@2")
    world.runtimes[0].promote("a@2")
    for _ in range(REST + 1):
        world.settle(scheduler.interval)
    assert world.held()["a@2"] == ALL


def test_a_profile_counts_the_granules_of_its_runtime(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m", "m", [3 * GRANULE, 1000, 1])
    with Runtime(arena=8 * GRANULE, granule=2 * GRANULE, tensors="numpy") as runtime:
        model = runtime.register("m", path)
        assert profile_of(model, **TIMES).layer_bytes == (4 * GRANULE, 2 * GRANULE, 2 * GRANULE)
        assert profile_of(model, **TIMES, granule=GRANULE).layer_bytes == (
            3 * GRANULE,
            GRANULE,
            GRANULE,
        )


def test_a_fleet_of_a_revision_knows_it_by_its_bare_name(world: World, tmp_path: Path) -> None:
    runtime = world.runtimes[0]
    for name in ("chat@1", "chat@2"):
        register(world, tmp_path, name)
    profile = profile_of(runtime.model("chat"), **TIMES)
    assert profile.name == "chat@1"
    world.fleet.add(profile)
    world.begin(recent=1.0, memory=1e6, models=4)
    for name in ("chat", "chat@1", "chat@2"):  # each name is traffic of one model
        world.ask(name, 4)
    world.settle()
    assert world.held() == {"chat@1": ALL}
    runtime.promote("chat@2")
    world.ask("chat", 4)
    world.settle()
    world.settle()
    assert world.held()["chat@2"] == ALL


def test_an_unregistered_model_is_reported_once_and_the_others_are_planned(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.begin(recent=1.0, memory=1e6)
    world.ask("a", 8)
    world.settle()
    world.runtimes[0].unregister("a")
    with caplog.at_level(logging.WARNING, "warmserve_rt"):
        for _ in range(5):
            world.ask("b", 8)
            world.settle()
    assert world.held() == {"b": ALL}
    assert [str(error) for error in world.fleet.errors] == ["no model 'a' is registered"]
    assert len(caplog.records) == 1


def test_a_model_that_is_registered_again_is_loaded_again(world: World, tmp_path: Path) -> None:
    world.begin(recent=1.0, memory=1e6)
    world.ask("a", 8)
    world.settle()
    for told in (1, 2):  # the error is reported each time
        world.runtimes[0].unregister("a")
        world.settle()
        world.ask("b", 1)
        world.settle()
        folder = tmp_path / str(told)
        folder.mkdir()
        register(world, folder, "a")
        world.ask("a", 8)
        world.settle()
        assert world.held()["a"] == ALL
        assert len(world.fleet.errors) == told


def test_a_model_with_other_layers_is_reported_once(world: World, tmp_path: Path) -> None:
    world.begin(recent=1.0, memory=1e6)
    world.runtimes[0].unregister("a")
    register(world, tmp_path, "a", SIZES["a"][:3])
    for _ in range(3):
        world.ask("a", 8)
        world.settle()
    assert [str(error)[:54] for error in world.fleet.errors] == [
        "a has 3 layers on device 0, and 4 in its profile: give"
    ]
    world.fleet.remove("a")
    world.fleet.add(profile_of(world.runtimes[0].model("a"), **TIMES))
    world.ask("a", 8)
    world.settle()
    assert world.held() == {"a": [0, 1, 2]}


def test_a_model_that_is_added_is_loaded_and_one_that_is_removed_gives_way(
    world: World, tmp_path: Path
) -> None:
    world.begin(recent=1.0, memory=1e6)
    world.ask("a", 8)
    world.settle()
    register(world, tmp_path, "d")
    world.fleet.add(world.runtimes[0].model("d"), service=1.0, **TIMES)
    world.fleet.remove("a")
    assert world.fleet.models == ("b", "c", "d")
    world.ask("d", 2)
    world.settle()
    assert world.held() == {"a": [0, 1], "d": ALL}
    keep = [layer.keep_value for layer in world.runtimes[0].snapshot().models["a"].layers]
    assert max(keep) <= 0
    with pytest.raises(ValueError, match="'a' has no profile: the fleet has b, c, d"):
        world.fleet.arrived("a", 1)
    assert not world.fleet.errors


def test_removing_a_model_keeps_the_demand_of_the_others(world: World) -> None:
    scheduler = world.begin(recent=0.5, memory=1e3)
    world.ask("a", 3)
    for _ in range(5):
        world.fleet.arrived("c", 77)
    world.settle()
    rate, prompts = scheduler.demand.rates[2], list(scheduler.demand.prompts[2])
    world.fleet.remove("a")
    world.fleet.poll()
    assert [profile.name for profile in scheduler.fleet.profiles] == ["b", "c"]
    assert scheduler.demand.rates[1] == rate
    assert list(scheduler.demand.prompts[1]) == prompts
    world.settle()
    for _ in range(5):
        world.fleet.finished("c")
    world.settle()
    assert world.held() == {"a": [0, 1], "c": ALL}  # no other model needs the room


def test_requests_of_a_removed_model_may_finish(world: World) -> None:
    world.begin()
    world.fleet.arrived("a", 10)
    world.fleet.remove("a")
    world.settle()
    world.fleet.finished("a")
    with pytest.raises(ValueError, match="'a' has no profile"):
        world.fleet.finished("a")
    assert not world.fleet.errors


def test_a_fleet_whose_last_model_is_removed_goes_on_with_the_next(world: World) -> None:
    world.begin(recent=1.0, memory=1e6)
    for name in SIZES:
        world.fleet.remove(name)
    for _ in range(REST + 1):
        world.settle(2.0)
    with pytest.raises(ValueError, match="'a' has no profile: the fleet has none"):
        world.fleet.remove("a")
    world.fleet.add(world.profile("b"))
    world.ask("b", 8)
    world.settle()
    assert world.held() == {"b": ALL}
    assert not world.fleet.errors


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("a", {}, "the fleet has 'a' already"),
        ("z", {}, "no model 'z' is registered"),
        ("a@2", {}, "the fleet has 'a' already"),
        ("b", {"service": 0.0}, "service must be positive"),
        ("b", {"service": float("nan")}, "service must be positive"),
        ("b", {"width": 2}, "b needs 2 devices"),
    ],
)
def test_invalid_additions_are_refused(
    world: World, name: str, options: dict[str, Any], problem: str
) -> None:
    world.fleet.remove("b")
    profile = replace(world.profile("b"), name=name, width=options.pop("width", 1))
    with pytest.raises(ValueError, match=problem):
        world.fleet.add(profile, **options)
    assert world.fleet.models == ("a", "c")


def test_services_of_other_models_are_refused(world: World) -> None:
    for service in ([1.0], {"a": 1.0, "b": 1.0}):
        with pytest.raises(ValueError, match="seconds for each of a, b, c"):
            world.fleet.begin(Scheduler(), Forecaster(3), service)
    with pytest.raises(ValueError, match="made for 2 models without names and cannot forecast 3"):
        world.fleet.begin(Scheduler(), Forecaster(2), [1.0] * 3)
    scheduler = Scheduler()
    world.fleet.begin(scheduler, Forecaster(["c", "z"]), {"c": 1.0, "b": 2.0, "a": 3.0})
    assert scheduler.demand.service == [3.0, 2.0, 1.0]


def test_models_come_and_go_in_many_threads_while_plans_are_made(tmp_path: Path) -> None:
    """Run a real loop and four threads that add, remove and ask; then serve the models left."""
    from warmserve_rt import Runtime

    with Runtime(arena=6 * GRANULE, tensors="numpy") as runtime:
        names = [f"m{i}" for i in range(8)]
        for name in names:
            runtime.register(name, write_model(tmp_path / name, name, SIZES["a"]))
        profiles = [profile_of(runtime.model(name), **TIMES) for name in names]
        with RuntimeFleet([runtime], profiles, bandwidth=1e9) as fleet:
            fleet.begin(Scheduler(interval=0.01), Forecaster(names), [1.0] * len(names))
            fleet.start()
            failures: list[BaseException] = []

            def change(mine: list[str]) -> None:
                try:
                    for _ in range(60):
                        for name in mine:
                            fleet.remove(name)
                            fleet.add(runtime.model(name), **TIMES)
                            fleet.arrived(name, 10)
                            fleet.finished(name)
                except BaseException as error:
                    failures.append(error)

            threads = [threading.Thread(target=change, args=(names[i::4],)) for i in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert failures == []
            assert sorted(fleet.models) == names
            assert not fleet.errors


# The forecaster.


def test_a_forecast_does_not_change_when_other_models_come_and_go() -> None:
    random = np.random.default_rng(5)
    history = random.uniform(0, 9, (400, 3))
    alone, changing = Forecaster(["b"]), Forecaster(["a", "b", "c"])
    alone.observe_windows(0, history[:, 1:2], history[:, 1:2])
    changing.observe_windows(0, history, history)
    now = 400 * 300.0
    for at, names in enumerate((["b", "d"], ["e", "d", "f", "b"], ["b"], ["a", "b"])):
        changing.arrange(names)
        row = names.index("b")
        for i in range(200):
            now += 100.0
            for model in range(len(names)):
                changing.observe(model, now, float((i * (model + at)) % 7))
            alone.observe(0, now, float((i * (row + at)) % 7))
        for horizon in (60.0, 300.0, 5000.0):
            one, other = alone.forecast(now, horizon), changing.forecast(now, horizon)
            for part in ("average", "peak", "upper"):
                assert getattr(one, part)[0] == getattr(other, part)[row]
                assert np.isfinite(getattr(other, part)).all()


def test_names_are_saved_with_the_forecasts(tmp_path: Path) -> None:
    made = Forecaster(["a", "b"])
    made.observe_windows(0, np.ones((50, 2)), np.ones((50, 2)))
    made.arrange(["b", "c"])
    made.save(tmp_path / "state")
    loaded = Forecaster.load(tmp_path / "state")
    assert loaded.names == ("b", "c")
    before, after = (each.forecast(50 * 300.0, 300.0).average for each in (made, loaded))
    assert before.tolist() == after.tolist() == [1.0, 0.0]


def test_repeated_and_invalid_names_are_refused() -> None:
    for names in (["a", "a"], ["a", 3]):
        with pytest.raises(ValueError, match="names of models must be strings, each given once"):
            Forecaster(names)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="each given once"):
            Forecaster(["a"]).arrange(names)  # type: ignore[arg-type]
