"""Risk: bytes arrive faster than the host links carry them, or background loads delay loads that a
request waits for."""

from __future__ import annotations

from typing import Any

import pytest
from sim_checks import Scripted, workload

from warmserve_rt.policy.profile import ModelProfile
from warmserve_rt.sim.core.devices import Device, Hardware
from warmserve_rt.sim.core.fleet import Fleet
from warmserve_rt.sim.core.links import Flow

LAYERS = (100,) * 10
MODELS = [ModelProfile(f"m{i}", 1, LAYERS, 1, 0.0, 0.0, 0.01) for i in range(4)]


def fleet_of(devices: int = 4, **hardware: Any) -> Fleet:
    """Return a fleet with links of 100 bytes a second; by default the background has no share."""
    hardware = {"background_share": 0.0, "memory": 1e5, "bandwidth": 100.0, **hardware}
    fleet = Fleet(
        workload(MODELS, []), Hardware(devices, devices, **hardware), Scripted(), switch_s=0.0
    )
    fleet.controller.begin(fleet)
    return fleet


def background(fleet: Fleet, device: int, model: int, priority: float = 0.0) -> Flow:
    assert fleet.memory.prewarm(fleet.devices[device], model, 0, len(LAYERS), priority=priority)
    flow = fleet.devices[device].shards[model, 0].flow
    assert flow is not None
    return flow


def foreground(fleet: Fleet, device: int, model: int) -> Flow:
    fleet.start(model, [fleet.devices[device]])
    fleet.clock.run(fleet.now + 1e-9)
    return fleet.devices[device].foreground[-1]


def here(device: Device, model: int) -> float:
    return device.shards[model, 0].resident_now


def test_background_loads_pause_for_foreground_loads_and_resume() -> None:
    fleet = fleet_of()
    device = fleet.devices[0]
    waiting = background(fleet, 0, 0)
    fleet.clock.run(3.0)
    urgent = foreground(fleet, 0, 1)
    assert (urgent.rate, waiting.rate) == (100.0, 0.0)
    fleet.clock.run(8.0)
    assert here(device, 0) == pytest.approx(300)
    assert here(device, 1) == pytest.approx(500)
    fleet.clock.run(14.0)
    assert here(device, 1) == 1000
    assert here(device, 0) == pytest.approx(400)
    assert waiting.rate == 100.0


def test_background_loads_keep_exactly_their_share() -> None:
    fleet = fleet_of(background_share=0.05)
    waiting = background(fleet, 0, 0)
    urgent = foreground(fleet, 0, 1)
    assert (urgent.rate, waiting.rate) == pytest.approx((95.0, 5.0))
    alone = foreground(fleet, 1, 0)
    assert alone.rate == 100.0  # its link has no other load


def test_the_load_of_the_highest_priority_runs_alone() -> None:
    fleet = fleet_of()
    low, middle = background(fleet, 0, 0, 1.0), background(fleet, 0, 1, 2.0)
    same = background(fleet, 0, 2, 2.0)  # equal priorities load in order
    assert [low.rate, middle.rate, same.rate] == [0.0, 100.0, 0.0]
    fleet.clock.run(5.0)
    high = background(fleet, 0, 3, 3.0)
    assert [low.rate, middle.rate, same.rate, high.rate] == [0.0, 0.0, 0.0, 100.0]
    ends = []
    for time in (14.5, 15.5, 19.5, 20.5, 29.5, 30.5, 39.5, 40.5):
        fleet.clock.run(time)
        ends.append([here(fleet.devices[0], m) == 1000 for m in (3, 1, 2, 0)])
    assert ends[::2] == [[True] * i + [False] * (4 - i) for i in range(4)]
    assert ends[1::2] == [[True] * i + [False] * (4 - i) for i in range(1, 5)]


def test_arrived_layers_stay_when_a_load_is_cancelled() -> None:
    fleet = fleet_of()
    device = fleet.devices[0]
    background(fleet, 0, 0)
    fleet.clock.run(5.5)
    fleet.memory.cancel(device, device.shards[0, 0], 2)  # five and a half layers have arrived
    assert here(device, 0) == 500 == device.used
    assert not device.background
    fleet.clock.run(9.0)
    assert here(device, 0) == 500
    background(fleet, 0, 0)
    fleet.clock.run(14.1)
    assert here(device, 0) == 1000
    assert fleet.links.loaded_bytes == pytest.approx(1050)
    assert fleet.memory.wasted_bytes == pytest.approx(50)


def test_extending_a_load_takes_the_time_of_the_added_layers() -> None:
    fleet = fleet_of()
    device = fleet.devices[0]
    assert fleet.memory.prewarm(device, 0, 0, 4)
    fleet.clock.run(2.0)
    assert fleet.memory.prewarm(device, 0, 0, 8, priority=7.0)
    fleet.clock.run(5.0)
    assert device.shards[0, 0].layers == 5
    assert device.background[0].priority == 7.0
    fleet.clock.run(9.0)
    assert here(device, 0) == 800
    assert fleet.links.loaded_bytes == pytest.approx(800)


@pytest.mark.parametrize(
    ("multipath", "urgent", "rate"),
    [(1, 1, 100), (2, 1, 200), (4, 1, 400), (9, 1, 400), (4, 2, 200), (2, 2, 200), (4, 3, 400 / 3),
     (4, 4, 100)],
)  # fmt: skip
def test_a_load_uses_the_links_of_idle_peers_only(multipath: int, urgent: int, rate: float) -> None:
    fleet = fleet_of(multipath=multipath)
    flows = [foreground(fleet, device, 0) for device in range(urgent)]
    assert [flow.rate for flow in flows] == pytest.approx([rate] * urgent)


def test_multipath_leaves_peers_background_loads_their_share() -> None:
    fleet = fleet_of(multipath=3, background_share=0.1)
    waiting = background(fleet, 1, 0)
    urgent = foreground(fleet, 0, 0)
    # Two links' worth of the 2.9 that three devices without urgent loads can spare.
    assert urgent.rate == pytest.approx(300)
    assert waiting.rate == pytest.approx(100 * (1 - 0.9 * 2 / 2.9))
    fleet = fleet_of(multipath=8, background_share=0.1)
    waiting = background(fleet, 1, 0)
    urgent = foreground(fleet, 0, 0)
    assert (urgent.rate, waiting.rate) == pytest.approx((390, 10))


def test_devices_behind_a_switch_share_its_link() -> None:
    fleet = fleet_of(switch_devices=2)
    first = foreground(fleet, 0, 0)
    assert first.rate == 100
    second = foreground(fleet, 1, 0)
    assert (first.rate, second.rate) == (50, 50)
    third, fourth = background(fleet, 2, 0), background(fleet, 3, 0)
    assert (third.rate, fourth.rate) == (50, 50)
    fleet = fleet_of(switch_devices=2, multipath=4)
    assert foreground(fleet, 0, 0).rate == 200  # the node has only two links
    fleet = fleet_of(switch_devices=2, multipath=4)
    flows = [foreground(fleet, device, 0) for device in (0, 2)]
    assert [flow.rate for flow in flows] == [100, 100]


def test_a_load_uses_no_links_of_other_nodes() -> None:
    fleet = Fleet(workload(MODELS, []), Hardware(4, 2, 1e5, 100.0, 4), Scripted(), switch_s=0.0)
    fleet.controller.begin(fleet)
    assert foreground(fleet, 0, 0).rate == 200


# Disk and host memory.


def test_layers_outside_host_memory_load_at_disk_speed() -> None:
    fleet = fleet_of(host_memory=2500.0, disk_bandwidth=60.0)
    first = foreground(fleet, 0, 0)
    assert first.rate == 60
    second = foreground(fleet, 1, 0)  # still being read, so not in host memory yet
    assert (first.rate, second.rate) == (30, 30)
    fleet.clock.run(40.0)
    again = foreground(fleet, 2, 0)
    assert again.rate == 100
    assert 0 in fleet.links.host_memories[0]
    assert 1 not in fleet.links.host_memories[0]


def test_every_rank_loads_from_disk_and_again_after_a_restart() -> None:
    wide = ModelProfile("wide", 2, LAYERS, 1, 0.0, 0.0, 0.01)
    hardware = Hardware(2, 2, 1e5, 100.0, host_memory=1e4, disk_bandwidth=60.0)
    fleet = Fleet(workload([wide], []), hardware, Scripted())
    fleet.controller.begin(fleet)
    for rank, device in enumerate(fleet.devices):
        fleet.memory.prewarm(device, 0, rank, 5)
    fleet.clock.run(5.0)
    for rank, device in enumerate(fleet.devices):
        fleet.memory.prewarm(device, 0, rank, 10)
    assert [device.background[0].rate for device in fleet.devices] == [30, 30]
    device = fleet.devices[1]
    fleet.clock.run(6.0)
    fleet.memory.keep(device, device.shards[0, 1], 0)
    assert fleet.memory.prewarm(device, 0, 1, 2)  # 180 of its bytes had been read
    assert device.background[0].rate == 100
    fleet.clock.run(7.01)
    assert device.background[0].rate == 30


def test_a_load_changes_its_speed_with_the_place_of_its_next_layer() -> None:
    fleet = fleet_of(host_memory=2500.0, disk_bandwidth=50.0)
    for layer in (0, 1, 3):
        fleet.links.host_memories[0].add(0, 0, layer)
    flow = foreground(fleet, 0, 0)
    rates = []
    for time in (0.5, 1.5, 2.5, 3.5, 4.5, 5.5):
        fleet.clock.run(time)
        rates.append(flow.rate)
    assert rates == [100, 100, 50, 50, 100, 50]
    fleet.clock.run(20.0)
    assert here(fleet.devices[0], 0) == 1000
    assert fleet.links.host_memories[0].held(0) == [True] * 10


def test_a_load_goes_on_if_the_disk_is_as_fast_as_the_link() -> None:
    fleet = fleet_of(host_memory=2500.0, disk_bandwidth=100.0)
    fleet.links.host_memories[0].add(0, 0, 1)
    foreground(fleet, 0, 0)
    fleet.clock.run(10.1)
    assert here(fleet.devices[0], 0) == fleet.links.loaded_bytes == 1000


def test_background_reads_leave_the_disk_to_foreground_reads() -> None:
    fleet = fleet_of(host_memory=2500.0, disk_bandwidth=60.0, background_share=0.1)
    waiting = [background(fleet, device, 0) for device in (1, 2)]
    assert [flow.rate for flow in waiting] == [30, 30]
    urgent = foreground(fleet, 0, 1)
    assert urgent.rate == pytest.approx(54)
    assert [flow.rate for flow in waiting] == pytest.approx([3, 3])


def test_a_prefetch_takes_what_the_disk_has_left_and_no_link() -> None:
    fleet = fleet_of(host_memory=2500.0, disk_bandwidth=150.0)
    prefetch, host = fleet.links.prefetches[0], fleet.links.host_memories[0]
    prefetch.want([(0, 0, 0), (0, 0, 1), (1, 0, 5)])
    assert prefetch.rate == 150
    fleet.clock.run(fleet.now + 1.0)
    assert (host.held(0)[:3], prefetch.loaded_bytes) == ([True, False, False], 100)
    flow = foreground(fleet, 0, 2)
    assert (flow.rate, prefetch.rate) == (100, 50)
    begin = fleet.now
    fleet.clock.run(begin + 1.1)  # half of the layer had been read
    assert host.held(0)[:3] == [True, True, False]
    prefetch.want([(1, 0, 4)])  # instead of the layer that is being read
    fleet.clock.run(begin + 3.2)
    assert host.held(1) == [layer == 4 for layer in range(10)]
    assert prefetch.rate == 0


def test_a_prefetch_skips_layers_that_a_load_has_brought() -> None:
    fleet = fleet_of(host_memory=2500.0, disk_bandwidth=100.0)
    prefetch = fleet.links.prefetches[0]
    foreground(fleet, 0, 0)
    prefetch.want([(0, 0, layer) for layer in range(10)])
    fleet.clock.run(30.0)
    assert fleet.links.host_memories[0].held(0) == [True] * 10
    assert prefetch.loaded_bytes == 0


def test_infinite_host_memory_holds_every_model() -> None:
    fleet = fleet_of(disk_bandwidth=1.0)
    assert foreground(fleet, 0, 0).rate == 100
    assert 3 in fleet.links.host_memories[0]


# Room.


def test_a_shortage_of_less_than_a_byte_evicts_a_layer() -> None:
    fleet = fleet_of(1, memory=1999.75)
    background(fleet, 0, 0)
    assert fleet.memory.load(fleet.devices[0], 1, 0, 10, [(1000.0, 1.0)])
    assert fleet.devices[0].shards[0, 0].target == 900


def test_eviction_takes_the_least_valuable_tail_layers_only_if_they_suffice() -> None:
    fleet = fleet_of(1, memory=2500.0)
    device = fleet.devices[0]
    assert fleet.memory.load(device, 0, 0, 10, [(400.0, 5.0), (1000.0, 2.0)])
    assert fleet.memory.load(device, 1, 0, 10, [(300.0, 4.0), (1000.0, 1.0)])
    fleet.clock.run(25.0)
    assert fleet.memory.wasted_bytes == 0

    def targets() -> list[float]:
        return [device.shards[m, 0].target for m in range(4) if (m, 0) in device.shards]

    assert not fleet.memory.load(device, 2, 0, 10, [(1000.0, 1.0)])  # of equal value
    assert targets() == [1000, 1000]
    assert fleet.memory.load(device, 2, 0, 10, [(1000.0, 1.5)])
    assert targets() == [1000, 500, 1000]
    assert fleet.memory.wasted_bytes == 500
    assert not fleet.memory.load(device, 3, 0, 10, [(1000.0, 1.2)])  # only 200 bytes are worth less
    assert targets() == [1000, 500, 1000]
    assert fleet.memory.load(device, 3, 0, 10, [(1000.0, 3.0)])
    assert targets() == [1000, 300, 200, 1000]
    fleet.start(1, [device], drop_others=False)
    assert device.used == 2500
    assert device.shards[1, 0].pinned
