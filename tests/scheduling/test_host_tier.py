"""Risk: the layers that a plan leaves to the host cache are not there when a start loads them, or a
runtime without a cache is planned as if it had one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import GRANULE, write_model
from conftest import Device
from polled_fleet import Clock, PolledFleet
from test_runtime_fleet import BANDWIDTH

from warmserve_rt import Runtime, testing
from warmserve_rt.policy.forecast import Forecaster
from warmserve_rt.scheduling.device import BACKOFF_S
from warmserve_rt.scheduling.fleet import RuntimeFleet
from warmserve_rt.scheduling.registered_models import profile_of
from warmserve_rt.scheduling.scheduler import Scheduler

staged = pytest.mark.parametrize("device", ["host-staged", "simcuda"], indirect=True)
NAMES = "abc"
ALL = [0, 1, 2, 3]


class Served(PolledFleet):
    """Hold a runtime of six granules without threads, three models of four, and a manual clock."""

    def __init__(self, runtime: Runtime, folder: Path, **options: Any) -> None:
        self.runtime, self.runtimes, self.clock = runtime, [runtime], Clock()
        self.asked: list[dict[str, Any]] = []  # the options of each prewarm
        for name in NAMES:
            runtime.register(name, write_model(folder / name, name, [GRANULE] * 4))
        times = {"prefill_s": 0.1, "prefill_token_s": 0.0, "decode_s": 0.01}
        self.fleet = RuntimeFleet(
            [runtime],
            [profile_of(runtime.model(name), **times) for name in NAMES],
            bandwidth=BANDWIDTH,
            clock=self.clock,
        )
        self.scheduler = Scheduler(recent=1.0, memory=10.0, **options)
        self.fleet.begin(self.scheduler, Forecaster(len(NAMES)), [1.0] * len(NAMES))
        prewarm = runtime.prewarm
        self.refuse: Callable[[dict[str, Any]], object] = lambda options: None

        def recorded(model: Any, **options: Any) -> Any:
            self.asked.append(options)
            self.refuse(options)
            return prewarm(model, **options)

        runtime.prewarm = recorded  # type: ignore[method-assign]

    def layers(self, name: str, what: str) -> list[int]:
        states = self.runtime.snapshot().models[name].layers
        return [
            i
            for i, layer in enumerate(states)
            if (layer.cached if what == "cached" else layer.residency == "resident")
        ]

    @property
    def host_loads(self) -> int:
        return sum(options.get("to") == "host" for options in self.asked)


def served(device: Device, folder: Path, cache: int, **options: Any) -> Served:
    """Return a runtime with a host cache of this many granules, under a scheduler."""
    runtime = device.runtime(arena=6 * GRANULE, host_cache=cache * GRANULE, pump=True)
    return Served(runtime, folder, **options)


@staged
def test_a_model_that_the_plan_evicts_is_loaded_again_without_its_file(
    device: Device, tmp_path: Path
) -> None:
    world = served(device, tmp_path, 4)
    world.ask("a", 8)
    world.settle()
    assert world.layers("a", "resident") == ALL
    world.clock.now += 60.0
    for _ in range(3):
        world.ask("a", 1)
        world.ask("c", 20)
        world.settle()
    assert world.layers("c", "resident") == ALL
    assert world.layers("a", "resident") == [0, 1]
    assert {2, 3} <= set(world.layers("a", "cached"))
    before = world.runtime.snapshot().host_cache.misses
    with world.runtime.lease("a"):
        assert world.runtime.snapshot().host_cache.misses == before
    assert not world.fleet.errors
    world.fleet.close()


@staged
def test_layers_that_only_the_cache_holds_stay_and_those_of_the_device_leave(
    device: Device, tmp_path: Path
) -> None:
    world = served(device, tmp_path, 2)
    world.ask("a", 8)
    world.ask("b", 2)
    for _ in range(3):
        world.settle()
    assert (world.layers("a", "resident"), world.layers("b", "resident")) == (ALL, [0, 1])
    assert (world.layers("a", "cached"), world.layers("b", "cached")) == ([], [2, 3])
    world.runtime.evict("a")
    world.ask("a", 8)
    world.ask("b", 2)
    world.settle()  # the layers of a pass the cache again
    assert world.layers("a", "resident") == ALL
    assert world.layers("b", "cached") == [2, 3]
    values = {
        name: [layer.keep_value for layer in state.layers]
        for name, state in world.runtime.snapshot().models.items()
    }
    assert min(values["b"][2:]) > max(values["a"] + values["b"][:2]) > 0
    with world.runtime.lease("b"):  # the device evicts the last layers of a model first again
        world.ask("a", 8)
        world.ask("b", 2)
        world.settle()
    keep = [layer.keep_value for layer in world.runtime.snapshot().models["b"].layers]
    assert max(keep[2:]) <= min(keep[:2])
    world.fleet.close()


@staged
def test_layers_are_not_loaded_to_the_cache_twice(device: Device, tmp_path: Path) -> None:
    world = served(device, tmp_path, 4)
    world.ask("a", 8)
    world.ask("b", 2)
    world.plan()
    assert world.host_loads == 1
    world.plan()
    assert world.host_loads == 1  # it is still in progress
    world.settle()
    world.ask("a", 8)
    world.ask("b", 2)
    world.settle()
    assert world.host_loads == 1
    world.fleet.close()


@staged
def test_a_closed_fleet_cancels_its_loads_to_the_cache(device: Device, tmp_path: Path) -> None:
    world = served(device, tmp_path, 4)
    world.ask("a", 8)
    world.ask("b", 2)
    world.plan()
    world.fleet.close()
    while world.runtime.step():
        pass
    assert world.runtime.snapshot().host_cache.layers == 0


@staged
def test_a_removed_model_is_not_loaded_to_the_cache(device: Device, tmp_path: Path) -> None:
    world = served(device, tmp_path, 4)
    world.ask("a", 8)
    world.ask("b", 2)
    world.plan()
    world.fleet.remove("b")
    world.settle()
    assert world.layers("b", "cached") == []
    assert [layer.keep_value for layer in world.runtime.snapshot().models["b"].layers] == [0] * 4
    world.fleet.close()


@staged
def test_a_failed_load_to_the_cache_is_reported_and_repeated_later(
    device: Device, tmp_path: Path
) -> None:
    world = served(device, tmp_path, 4)

    def refuse(options: dict[str, Any]) -> None:
        if options.get("to") == "host":
            raise ValueError("the host cache is too small")

    world.refuse = refuse
    for _ in range(3):
        world.ask("a", 8)
        world.ask("b", 2)
        world.settle()
    assert world.layers("a", "resident") == ALL  # loads to the device go on
    assert [str(error) for error in world.fleet.errors] == ["the host cache is too small"]
    world.refuse = lambda options: None
    world.settle(BACKOFF_S + 1.0)
    world.ask("a", 8)
    world.ask("b", 2)
    world.settle()
    assert {2, 3} <= set(world.layers("b", "cached"))
    world.fleet.close()


@staged
def test_a_dry_run_tells_of_the_cache_and_loads_nothing(device: Device, tmp_path: Path) -> None:
    world = served(device, tmp_path, 4, dry_run=True)
    world.ask("a", 8)
    world.ask("b", 2)
    world.settle()
    said = world.scheduler.explain()
    start = "keeps 2 of 4 layers of b in host memory of device 0: "
    assert any(each.startswith(start) and "ms saved per MB" in each for each in said), said
    assert world.asked == []
    values = {x.keep_value for m in world.runtime.snapshot().models.values() for x in m.layers}
    assert values == {0.0}
    world.fleet.close()


def test_a_runtime_without_a_cache_is_planned_as_before(tmp_path: Path) -> None:
    watched = testing.watch(host_view=False, pump=True)
    with Runtime(driver=watched.driver, arena=6 * GRANULE, pump=True, tensors="numpy") as runtime:
        world = Served(runtime, tmp_path)
        world.ask("a", 8)
        world.ask("b", 2)
        world.settle()
        assert (world.layers("a", "resident"), world.layers("b", "resident")) == (ALL, [0, 1])
        assert (world.scheduler.host_plans, world.host_loads) == ([], 0)
        assert not world.fleet.errors
        world.fleet.close()
    watched.check()


def test_a_cache_that_could_not_be_pinned_is_planned_with_the_bytes_it_has(tmp_path: Path) -> None:
    watched = testing.watch(host_view=False, pump=True)
    watched.faults.arm([(1, 1)], only="pinned_create", status="out_of_memory")
    with Runtime(
        driver=watched.driver, arena=6 * GRANULE, host_cache=4 * GRANULE, pump=True,
        tensors="numpy",
    ) as runtime:  # fmt: skip
        assert runtime.snapshot().host_cache.error
        world = Served(runtime, tmp_path)
        world.ask("a", 8)
        world.ask("b", 2)
        world.settle()
        assert world.host_loads == 0
        assert not world.fleet.errors
        world.fleet.close()
    watched.check()


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan"), 2 * BANDWIDTH])
def test_an_invalid_file_bandwidth_is_refused(tmp_path: Path, speed: float) -> None:
    with Runtime(arena=6 * GRANULE, pump=True, tensors="numpy") as runtime:
        model = runtime.register("a", write_model(tmp_path / "a", "a", [GRANULE] * 4))
        profile = profile_of(model, prefill_s=0.1, prefill_token_s=0.0, decode_s=0.01)
        with pytest.raises(ValueError, match="file_bandwidth must be positive and at most"):
            RuntimeFleet([runtime], [profile], bandwidth=BANDWIDTH, file_bandwidth=speed)
