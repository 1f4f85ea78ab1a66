"""Risk: instances that share a device each behave as if they had it alone."""

from __future__ import annotations

from typing import Any

import pytest
from sim_checks import Scripted, run, tiny, workload

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.scheduling.scheduler import Scheduler
from warmserve_rt.sim.controllers.autoscaling import SharedDeviceAutoscaler
from warmserve_rt.sim.core.devices import KV_STEP, Hardware
from warmserve_rt.sim.core.fleet import Fleet

GB = 10**9
ONE = Hardware(1, 1, 100.0 * GB, 10.0 * GB, interference=0.5)
TIMES: dict[str, Any] = {"switch_s": 0.0, "elastic_kv": True}


def model(name: str, *, layers: int = 4, prefill: float = 0.2, **more: Any) -> ModelProfile:
    """Return a model of 10 GB, which loads in a second."""
    nbytes = (10 * GB // layers,) * layers
    values = {"kv_token_bytes": 1, "decode_s": 0.01, "decode_request_s": 0.0, "batch": 8, **more}
    return ModelProfile(name, 1, nbytes, prefill_s=prefill, prefill_token_s=0.0, **values)


def start(at: float, which: int) -> tuple[float, Any]:
    return at, lambda fleet: fleet.start(which, [fleet.devices[0]])


def waits(fleet: Fleet) -> list[float]:
    return [float(wait) for wait in fleet.first_token - fleet.workload.time]


def test_loads_of_one_device_run_one_after_another() -> None:
    models = [model("a"), model("b")]
    requests = workload(models, [(1.0, 0, 9, 1), (1.0, 1, 9, 1)])
    fleet, _ = run(requests, ONE, Scripted(start(1.0, 0), start(1.0, 1)), **TIMES)
    assert waits(fleet) == pytest.approx([1.0 + 0.2, 2.0 + 0.2])


def test_layers_stream_after_a_neighbours_load() -> None:
    """Each model has two blocks of a second each; the first arrives half a second into the load.

    The second load begins when the first ends. The neighbour slows its blocks. From 3.0 s on, when
    these blocks are seen to run, they slow the rest of the neighbour's blocks.
    """
    models = [model("a", prefill=2.0), model("b", prefill=2.0)]
    requests = workload(models, [(1.0, 0, 9, 900), (1.0, 1, 9, 1)])
    script = Scripted(start(1.0, 0), start(1.0, 1))
    fleet, _ = run(requests, ONE, script, streaming=True, **TIMES)
    assert waits(fleet)[0] == pytest.approx(2.0 + 0.5 * 1.5)
    assert waits(fleet)[1] == pytest.approx(1.5 + 2.0 * 1.5)


def test_a_neighbour_slows_prefills_and_steps_while_it_works() -> None:
    models = [model("a"), model("b")]
    rows = [(5.0, 0, 9, 101), (5.7, 1, 9, 1)]
    fleet, _ = run(workload(models, rows), ONE, Scripted(start(0.0, 0), start(0.0, 1)), **TIMES)
    assert waits(fleet) == pytest.approx([0.2, 0.2 * 1.5])
    # A second of steps: the 0.3 s beside the prefill did only 0.2 s of work.
    assert fleet.finished[0] == pytest.approx(5.2 + 1.0 + 0.3 - 0.2)


def test_only_partitions_are_slowed_by_an_idle_neighbour() -> None:
    models = [model("a"), model("b")]
    script = Scripted(
        start(0.0, 0), start(0.0, 1), (5.1, lambda fleet: fleet.stop(fleet.instances[1][0]))
    )
    rows = [(5.0, 0, 9, 1)]
    fleet, _ = run(workload(models, rows), ONE, script, partitioned=True, **TIMES)
    # A quarter of the prefill ran at half the speed, the rest alone.
    assert waits(fleet) == pytest.approx([0.1 + 0.15])


def test_instances_on_one_device_share_its_memory() -> None:
    """Memory holds the weights and the caches of two requests: the third waits until one ends."""
    token = KV_STEP / 100
    models = [model("a", kv_token_bytes=token), model("b", kv_token_bytes=token)]
    hardware = Hardware(1, 1, 20.0 * GB + 2 * KV_STEP, 10.0 * GB, interference=0.0)
    rows = [(5.0, 0, 50, 50), (5.0, 1, 50, 50), (5.1, 1, 50, 50)]
    fleet, _ = run(
        workload(models, rows), hardware, Scripted(start(0.0, 0), start(0.0, 1)), **TIMES
    )
    assert waits(fleet)[:2] == pytest.approx([0.2, 0.2])
    assert fleet.first_token[2] == pytest.approx(min(fleet.finished[:2]) + 0.2)
    assert fleet.devices[0].kv == 0


def test_an_elastic_cache_shrinks_with_its_requests() -> None:
    token = KV_STEP / 10
    requests = workload(
        [model("a", kv_token_bytes=token)], [(5.0, 0, 50, 2), (5.0, 0, 50, 50), (5.0, 0, 5, 90)]
    )
    seen: list[float] = []
    look = [(at, lambda fleet: seen.append(fleet.devices[0].kv)) for at in (5.5, 5.9, 6.3, 9.0)]
    run(requests, ONE, Scripted(start(0.0, 0), *look), **TIMES)
    assert seen == [steps * KV_STEP for steps in (25, 20, 10, 0)]


def test_instances_with_fixed_caches_cannot_share_a_device() -> None:
    fleet = Fleet(workload([tiny(), tiny(layers=(1, 1, 1))], []), Hardware(1, 1), Scripted())
    fleet.start(0, fleet.devices)
    with pytest.raises(ValueError, match="one has an instance"):
        fleet.start(1, fleet.devices)


# Our own autoscaler.


def ours(rows: list[tuple[float, int, int, int]], models: list[ModelProfile], hardware: Hardware,
         **options: Any) -> list[float]:  # fmt: skip
    """Return the waits when every layer is resident from the beginning."""

    def resident(fleet: Fleet) -> None:
        for device in fleet.devices:
            for each in range(len(models)):
                fleet.memory.preload(device, each, 0)

    controller = SharedDeviceAutoscaler(Scheduler(), **options)
    fleet = Fleet(workload(models, rows), hardware, controller, streaming=True, **TIMES)
    resident(fleet)
    fleet.run()
    return waits(fleet)


TWO = Hardware(2, 2, 100.0 * GB, 10.0 * GB, interference=0.5)


def test_the_autoscaler_starts_beside_a_busy_neighbour_instead_of_waiting() -> None:
    models = [model("a"), model("b")]
    rows = [(5.0, 0, 9, 2000), (6.0, 1, 9, 2)]
    assert ours(rows, models, ONE)[1] == pytest.approx(0.2 * 1.5)
    assert ours(rows, models, ONE, share=False)[1] > 19


def test_the_autoscaler_prefers_a_free_device_when_both_hold_the_same_layers() -> None:
    models = [model("a"), model("b")]
    rows = [(5.0, 0, 9, 2000), (6.0, 1, 9, 2)]
    assert ours(rows, models, TWO)[1] == pytest.approx(0.2)


def test_the_autoscaler_starts_an_instance_when_prefills_queue() -> None:
    """Twenty requests of 0.2 s each arrive at nearly the same time.

    On one instance the last waits for nearly four seconds, though the batch is not full; on two
    instances it waits for half of that.
    """
    rows = [(5.0 + i / 100, 0, 9, 2) for i in range(20)]
    models = [model("a", batch=32)]
    queued, spread = ours(rows, models, TWO, backlog_limit_s=1e9), ours(rows, models, TWO)
    assert max(queued) == pytest.approx(20 * 0.2 - 0.19, abs=0.05)
    assert max(spread) == pytest.approx(max(queued) / 2, rel=0.15)
