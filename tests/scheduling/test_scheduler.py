"""A scheduler could churn, ignore demand, or act when it should only explain its plan."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba")

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.policy.slo import Slo
from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.controllers.autoscaling import SharedDeviceAutoscaler
from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.workload.workloads import Workload, power_law

GB = 1_000_000_000


def models(n: int, width: int = 1, layers: int = 12) -> tuple[ModelProfile, ...]:
    return tuple(
        ModelProfile(f"m{i}", width, (GB,) * layers, 100_000, 0.005, 0.00005, 0.02)
        for i in range(n)
    )


def fleet(
    profiles: tuple[ModelProfile, ...],
    rate: float,
    scheduler: Scheduler | None = None,
    *,
    seconds: float = 120,
    alpha: float = 0.5,
    memory: float = 30 * GB,
    devices: int = 4,
    seed: int = 1,
) -> Fleet:
    workload = power_law(profiles, rate, seconds, seed, alpha=alpha)
    hardware = Hardware(devices=devices, node_devices=devices, memory=memory, bandwidth=10 * GB)
    return Fleet(
        workload,
        hardware,
        SharedDeviceAutoscaler(scheduler or Scheduler()),
        streaming=True,
        elastic_kv=True,
    )


def held(run: Fleet) -> dict[int, int]:
    """Return, for each model, the most layers that any one device holds of a rank."""
    found: dict[int, int] = {}
    for device in run.devices:
        for (model, _), shard in device.shards.items():
            found[model] = max(found.get(model, 0), shard.layers)
    return found


def test_every_model_is_held_if_all_fit() -> None:
    run = fleet(models(4), 0.5)
    run.run()
    assert set(held(run)) == {0, 1, 2, 3}
    assert run.start_hits / run.start_layers > 0.9


def test_models_with_more_requests_hold_more_layers() -> None:
    run = fleet(models(12), 0.6, alpha=1.5, memory=20 * GB, devices=2, seconds=300)
    run.run()
    layers = held(run)
    assert sum(layers.get(m, 0) for m in range(4)) > sum(layers.get(m, 0) for m in range(8, 12))


def test_a_steady_load_settles() -> None:
    """After 360 s of 600 s, the loads stay below 18 GB (1.5 models) for each start of the run."""
    run = fleet(models(8), 0.4, seconds=600)
    loaded: list[float] = []
    run.after(360.0, lambda: loaded.append(run.links.loaded_bytes))
    run.run()
    starts = run.starts
    assert run.links.loaded_bytes - loaded[0] < 18 * GB * starts


def test_memory_is_never_exceeded_and_every_request_is_served() -> None:
    run = fleet(models(6, width=2), 1.0)
    over: list[float] = []

    def look() -> None:
        over.extend(device.used - device.memory for device in run.devices)
        run.after(0.2, look)

    run.after(0.0, look)
    run.run()
    assert max(over) <= 1e-3
    assert not np.isnan(run.first_token).any()


def test_a_dry_run_explains_its_plan_and_does_nothing() -> None:
    scheduler = Scheduler(dry_run=True)
    run = fleet(models(4), 0.5, scheduler)
    run.controller.begin(run)
    said = scheduler.explain()
    assert any(line.startswith("keeps ") and "expected starts" in line for line in said)
    assert any(" of 12 layers of m0 on device " in line for line in said)
    run.clock.run(5.0)
    assert run.links.loaded_bytes == 0
    assert not any(device.shards for device in run.devices)


def test_an_explanation_names_the_evicted_layers() -> None:
    scheduler = Scheduler(dry_run=True)
    run = fleet(models(2), 0.5, scheduler, memory=12 * GB, devices=1)
    run.memory.preload(run.devices[0], 1, 0)
    run.controller.begin(run)
    scheduler.demand.forecast = lambda now, horizon: None  # type: ignore[method-assign]
    scheduler.demand.rates = [0.05, 1e-6]
    scheduler.plan()
    assert any(
        "of m0 on device 0" in line and "layers of m1" in line for line in scheduler.explain()
    )


def test_an_idle_instance_makes_room_at_once() -> None:
    """Two models take turns on one device: neither waits until the other has been idle for long."""
    profiles = models(2)
    time = np.array([0.0, 10.0, 20.0])
    workload = Workload(
        name="turns",
        models=profiles,
        time=time,
        model=np.array([0, 1, 0]),
        prompt=np.full(3, 100),
        output=np.full(3, 2),
        duration=30.0,
        history_window=300.0,
        history=np.zeros((0, 2)),
        service=np.array([1.0, 1.0]),
        dispersion=np.zeros((0, 2)),
    )
    hardware = Hardware(devices=1, node_devices=1, memory=30 * GB, bandwidth=10 * GB)
    run = Fleet(
        workload,
        hardware,
        SharedDeviceAutoscaler(Scheduler(), idle_timeout_s=1e9),
        streaming=True,
        elastic_kv=True,
    )
    run.run()
    assert (run.first_token - time).max() < 1.5
    assert run.starts == 3


def test_draining_frees_devices_for_a_model_that_waits() -> None:
    """One model has two instances with work for one; another arrives and finds no free device."""
    profiles = models(2)
    n = 40
    time = np.concatenate((np.linspace(0.0, 0.1, n), [3.0]))
    workload = Workload(
        name="drain",
        models=profiles,
        time=time,
        model=np.array([0] * n + [1]),
        prompt=np.full(n + 1, 100),
        output=np.array([100] * 20 + [2000] * 20 + [2]),
        duration=10.0,
        history_window=300.0,
        history=np.zeros((0, 2)),
        service=np.array([1.0, 1.0]),
        dispersion=np.zeros((0, 2)),
    )
    hardware = Hardware(devices=2, node_devices=2, memory=30 * GB, bandwidth=10 * GB)
    run = Fleet(
        workload, hardware, SharedDeviceAutoscaler(Scheduler()), streaming=True, elastic_kv=True
    )
    run.run()
    assert not np.isnan(run.first_token).any()
    assert run.finished[:n].max() > run.first_token[n]  # it did not wait for all of them


@pytest.mark.parametrize(
    "options", [{"objective": "fast"}, {"objective": 2.0}, {"objective": float("nan")}]
)
def test_an_invalid_objective_is_refused(options: dict[str, Any]) -> None:
    run = fleet(models(2), 0.5, Scheduler(**options))
    with pytest.raises(ValueError, match="objective"):
        run.run()


@pytest.mark.parametrize(("prefills", "seconds"), [(float("nan"), 0.2), (5.0, -1.0)])
def test_an_invalid_slo_is_refused(prefills: float, seconds: float) -> None:
    with pytest.raises(ValueError, match="SLO"):
        Slo(prefills, seconds)
