"""Risk: a simulation of an impossible setup runs and reports results."""

from __future__ import annotations

import math
from typing import Any

import pytest
from sim_checks import SMALL, Scripted, tiny, workload

from warmserve_rt.sim.core.devices import Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.study.run import simulate
from warmserve_rt.sim.workload import catalogue, workloads


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"devices": 0}, "got 0 devices"),
        ({"devices": -8}, "got -8 devices"),
        ({"devices": 12}, "whole nodes, got 12 devices in nodes of 8"),
        ({"node_devices": 0}, "in nodes of 0"),
        ({"switch_devices": 0}, "must divide node_devices = 8, got 0"),
        ({"switch_devices": 3}, "must divide node_devices = 8, got 3"),
        ({"memory": math.nan}, "positive and finite"),
        ({"memory": math.inf}, "positive and finite"),
        ({"bandwidth": math.nan}, "positive and finite"),
        ({"bandwidth": 0.0}, "positive and finite"),
        ({"disk_bandwidth": math.nan}, "positive and finite"),
        ({"disk_bandwidth": -1.0}, "positive and finite"),
        ({"multipath": 0}, "positive"),
        ({"host_memory": math.nan}, "host_memory must not be negative, got nan"),
        ({"host_memory": -1.0}, "host_memory must not be negative, got -1"),
        ({"background_share": 1.0}, "share must be in .* got 1"),
        ({"background_share": -0.1}, "share must be in .* got -0.1"),
        ({"background_share": math.nan}, "share must be in .* got nan"),
        ({"interference": -0.1}, "interference must be .* got -0.1"),
        ({"interference": math.nan}, "interference must be .* got nan"),
    ],
)
def test_invalid_hardware_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hardware(**wrong)


@pytest.mark.parametrize(
    ("policy", "hardware", "times", "said"),
    [
        ("nosuch", Hardware(), {}, "unknown policy 'nosuch'"),
        ("warmserve", Hardware(memory=20e9), {}, "larger than every device: 34.5 GB on each of 4"),
        ("h0", Hardware(memory=20e9), {}, "larger than every device"),
        ("warmserve", Hardware(16, 2), {}, "needs 4 devices of one node, which has 2"),
        ("warmserve", Hardware(), {"switch_s": -1.0}, "got -1"),
        ("warmserve", Hardware(), {"switch_s": math.nan}, "got nan"),
        ("autoscaling", Hardware(), {"engine_start_s": math.inf}, "inf s for an engine"),
    ],
)
def test_impossible_runs_are_refused(
    policy: str, hardware: Hardware, times: dict[str, float], said: str
) -> None:
    requests = workloads.power_law(catalogue.paper_models(), 1.0, 10.0, 0)
    with pytest.raises(ValueError, match=said):
        simulate(policy, requests, hardware, **times)


def test_forbidden_operations_of_a_controller_are_refused_and_change_nothing() -> None:
    wide = tiny(2)
    fleet = Fleet(workload([SMALL, wide, tiny(layers=(900, 900, 900))], []),
                  Hardware(4, 2, 1000.0, 1.0), Scripted())  # fmt: skip
    a, b, c, d = fleet.devices
    instance = fleet.start(0, [a])
    kv = instance.kv_room
    shard = a.shards[0, 0]
    for said, wrong in [
        ("needs 2 distinct devices", lambda: fleet.start(1, [c])),
        ("needs 2 distinct devices", lambda: fleet.start(1, [c, c])),
        ("must be of one node", lambda: fleet.start(1, [b, c])),
        ("one has an instance", lambda: fleet.start(1, [a, b])),
        ("one has an instance", lambda: fleet.start(0, [a])),
        ("is larger than the free memory", lambda: fleet.start(2, [d])),
        ("cannot stop an instance", lambda: fleet.stop(instance)),
        ("an instance uses", lambda: fleet.memory.keep(a, shard, 0)),
        (r"layers of small must be in \[0, 5\], got 6", lambda: fleet.memory.prewarm(b, 0, 0, 6)),
        ("got -1", lambda: fleet.memory.prewarm(b, 0, 0, -1)),
        ("no room", lambda: fleet.memory.preload(b, 2, 0)),
        ("bytes of KV cache", lambda: fleet.kv_caches.lend(instance, kv + 1)),
        ("bytes of KV cache", lambda: fleet.kv_caches.lend(instance, -1.0)),
        ("bytes of KV cache", lambda: fleet.kv_caches.lend(instance, math.nan)),
    ]:
        with pytest.raises(ValueError, match=said):
            wrong()
    assert [len(device.shards) for device in fleet.devices] == [1, 0, 0, 0]
    assert fleet.starts == 1
    assert instance.kv_room == kv
    fleet.clock.run(fleet.now + 1000)
    fleet.stop(instance)
    with pytest.raises(ValueError, match="has ended"):
        fleet.stop(instance)
