"""Risk: a part of a model is taken for the whole, or an operation on a part affects the whole."""

from __future__ import annotations

import os
import select
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model
from conftest import Device

from warmserve_rt import (
    FOREGROUND,
    Busy,
    Cancelled,
    CorruptCheckpoint,
    OutOfDeviceMemory,
    Runtime,
)

SIZES = {"a": [GRANULE, 100, GRANULE + 8, 5], "b": [2 * GRANULE, GRANULE], "c": [GRANULE] * 6}


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path / name, name, sizes) for name, sizes in SIZES.items()}


@pytest.fixture
def runtime(device: Device, files: dict[str, Path]) -> Runtime:
    """Return a pumped runtime, which does nothing by itself, with room for six granules."""
    made = device.runtime(arena=6 * GRANULE, chunk=GRANULE, staging=2 * GRANULE, pump=True)
    for name, path in files.items():
        made.register(name, path)
    return made


def resident(runtime: Runtime, name: str) -> list[int]:
    """Return the resident layers of a model, after checking the bytes of each."""
    found = []
    for index, layer in enumerate(runtime.snapshot().models[name].layers):
        if layer.residency == "resident":
            read = runtime.read_back(name, index).tobytes()
            assert read == content(name, index, SIZES[name][index])
            found.append(index)
    return found


def run(runtime: Runtime) -> None:
    while runtime.step():
        pass


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (2, [0, 1]),
        (4, [0, 1, 2, 3]),
        ([3, 1], [1, 3]),
        (slice(1, 3), [1, 2]),
        (range(0, 4, 3), [0, 3]),
        (["model.layers.2"], [2]),
        (None, [0, 1, 2, 3]),
    ],
)
def test_any_set_of_layers_can_be_loaded(
    runtime: Runtime, layers: Any, expected: list[int]
) -> None:
    ticket = runtime.prewarm("a", layers=layers)
    ticket.wait(20)
    assert resident(runtime, "a") == expected
    granules = sum(-(-SIZES["a"][layer] // GRANULE) for layer in expected)
    assert ticket.progress == (granules * GRANULE, granules * GRANULE)
    assert runtime.snapshot().granules_free == 6 - granules


@pytest.mark.parametrize(
    ("layers", "problem"),
    [
        (0, "must name at least one layer of 'a'"),
        ([], "at least one layer"),
        (slice(4, 9), "at least one layer"),
        (5, "layers of 'a' must be from 0 to 4, got 5"),
        (-1, "from 0 to 4, got -1"),
        ([4], "'a' has no layer 4: it has 4 layers"),
        ([-1], "no layer -1"),
        (["head"], "no layer 'head'"),
        ([1, 1], "'model.layers.1' of 'a' is named twice"),
        ([1, "model.layers.1"], "named twice"),
    ],
)
def test_invalid_layers_are_refused(runtime: Runtime, layers: Any, problem: str) -> None:
    for operation in (runtime.prewarm, runtime.lease, runtime.evict):
        with pytest.raises(ValueError, match=problem):
            operation("a", layers=layers)
    assert resident(runtime, "a") == []


def test_invalid_combinations_of_arguments_are_refused(runtime: Runtime) -> None:
    with pytest.raises(TypeError, match=r"got the name 'head': write \['head'\]"):
        runtime.prewarm("a", layers="head")
    with pytest.raises(ValueError, match="layers and keep exclude each other"):
        runtime.evict("a", layers=[1], keep=2)
    with pytest.raises(ValueError, match="named twice"):
        runtime.evict("a", keep=[1, 1])
    with pytest.raises(ValueError, match="layers must be None for several models"):
        runtime.lease(["a", "b"], layers=1)
    with pytest.raises(
        ValueError, match="wait must be 'nothing', 'streams' or 'leases', got 'ever'"
    ):
        runtime.evict("a", wait="ever")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no layer 9"):
        runtime.set_keep_value("a", 1.0, layer=9)


def test_chosen_layers_can_be_kept_or_evicted(runtime: Runtime) -> None:
    runtime.prewarm("a").wait(20)
    runtime.evict("a", keep=3)
    assert resident(runtime, "a") == [0, 1, 2]
    runtime.evict("a", layers=["model.layers.1"])
    assert resident(runtime, "a") == [0, 2]
    runtime.evict("a", keep=4)  # nothing to evict
    assert resident(runtime, "a") == [0, 2]
    runtime.evict("a", keep=[2])
    assert resident(runtime, "a") == [2]
    runtime.evict("a", keep=0)
    assert resident(runtime, "a") == []


def test_a_ticket_tells_of_each_layer(runtime: Runtime) -> None:
    ticket = runtime.prewarm("a", layers=[0, 2])
    ticket.wait(20, layer=0)
    assert resident(runtime, "a") == [0]
    with pytest.raises(ValueError, match="does not include layer 1 of 'a'"):
        ticket.wait(20, layer=1)
    with pytest.raises(ValueError, match="no layer 4"):
        ticket.wait(20, layer=4)
    with pytest.raises(TimeoutError, match="layer 2 of 'a' did not arrive in time"):
        ticket.wait(0, layer=2)
    ticket.wait(20, layer=2)
    assert ticket.done
    ticket.wait(0, layer=0)


def test_layers_of_one_model_make_room_for_each_other(runtime: Runtime) -> None:
    """The layers that a ticket wants stay; other layers of the same model may be evicted."""
    runtime.prewarm("b").wait(20)
    runtime.prewarm("c", layers=[0, 1, 2]).wait(20)
    assert resident(runtime, "c") == [0, 1, 2]
    runtime.prewarm("b", layers=1).wait(20)
    runtime.prewarm("c", layers=[2, 3, 4, 5]).wait(20)
    assert resident(runtime, "c")[-4:] == [2, 3, 4, 5]
    with runtime.lease("c", layers=[0, 1, 2]):
        with pytest.raises(Busy, match="needs 8 MiB of a budget of 12 MiB"):
            runtime.prewarm("a", layers=3)
        runtime.prewarm("b", layers=2).wait(20)
        assert resident(runtime, "c")[:3] == [0, 1, 2]
    with pytest.raises(OutOfDeviceMemory, match="needs 18 MiB"):
        runtime.lease(["c", "b"]).acquire()


def test_a_lease_on_some_layers_holds_no_others(runtime: Runtime) -> None:
    with runtime.lease("a", layers=[1, 2]) as lease:
        assert resident(runtime, "a") == [1, 2]
        runtime.prewarm("a").wait(20)
        with pytest.raises(Busy, match="'a' is leased"):
            runtime.evict("a", layers=[0, 1])
        runtime.evict("a", layers=[0, 3])
        assert resident(runtime, "a") == [1, 2]
        assert [x.leases for x in runtime.snapshot().models["a"].layers] == [0, 1, 1, 0]
        with pytest.raises(ValueError, match=r"layer 3 of 'a' is not in this lease"):
            lease.wait(3)
        assert not runtime.model("a").leased
        with pytest.raises(Busy):
            runtime.swap(evict="a", load="b")
    assert [x.leases for x in runtime.snapshot().models["a"].layers] == [0, 0, 0, 0]


def test_evicting_filling_layers_keeps_the_others(runtime: Runtime) -> None:
    ticket = runtime.prewarm("a")
    ticket.wait(20, layer=0)
    while runtime.snapshot().models["a"].layers[2].residency != "filling":
        runtime.step()
    runtime.evict("a", layers=[2, 3])
    run(runtime)
    assert resident(runtime, "a") == [0, 1]
    with pytest.raises(Cancelled, match="'a' was evicted"):
        ticket.wait(20)
    with pytest.raises(Cancelled):
        ticket.wait(20, layer=2)
    ticket.wait(20, layer=1)
    runtime.prewarm("a").wait(20)
    assert resident(runtime, "a") == [0, 1, 2, 3]


def test_a_cancelled_load_keeps_the_arrived_layers(runtime: Runtime) -> None:
    ticket = runtime.prewarm("a")
    ticket.wait(20, layer=1)
    ticket.cancel()
    ticket.cancel()  # a second cancellation does nothing
    run(runtime)
    # Layer 2 is one chunk, which may have been sent before the cancellation.
    assert resident(runtime, "a") in ([0, 1], [0, 1, 2])
    with runtime.lease("a", layers=2):
        pass
    with pytest.raises(Cancelled):
        ticket.wait(0)


def test_a_failed_load_keeps_the_arrived_layers(runtime: Runtime, files: dict[str, Path]) -> None:
    runtime.prewarm("a", layers=2).wait(20)
    os.utime(files["a"], (0, 0))
    with pytest.raises(CorruptCheckpoint):
        runtime.lease("a").acquire()
    ticket = runtime.prewarm("a")
    with pytest.raises(CorruptCheckpoint):
        ticket.wait(20)
    assert resident(runtime, "a") == [0, 1]
    with runtime.lease("a", layers=2, streaming=True) as lease:
        lease.wait(1)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_not_in_the_future_is_refused(runtime: Runtime, deadline: float) -> None:
    with pytest.raises(ValueError, match="deadline must be"):
        runtime.prewarm("a", deadline=deadline)


def test_a_ticket_past_its_deadline_is_cancelled(device: Device, files: dict[str, Path]) -> None:
    """A loader cancels a late ticket before its next step, or when it has no other work."""
    runtime, watched = device.watched_runtime(loaders=1)
    runtime.register("a", files["a"])
    watched.faults.delay("map", 0.2)
    ticket = runtime.prewarm("a", deadline=0.3)
    with pytest.raises(TimeoutError, match="prewarm of 'a' was not done by its deadline"):
        ticket.wait(20)
    watched.faults.delay("map", 0.0)
    assert runtime.snapshot().models["a"].layers[3].residency == "absent"
    runtime.prewarm("a", deadline=60.0).wait(20)
    runtime.check_invariants()


def order_of_arrival(runtime: Runtime) -> list[tuple[str, int]]:
    arrived: list[tuple[str, int]] = []
    while runtime.step():
        for name, model in runtime.snapshot().models.items():
            for index, layer in enumerate(model.layers):
                if layer.residency == "resident" and (name, index) not in arrived:
                    arrived.append((name, index))
    return arrived


def test_the_earlier_deadline_goes_first_among_equals(runtime: Runtime) -> None:
    runtime.prewarm("b", layers=[1], deadline=500)
    runtime.prewarm("a", layers=[1], deadline=400)
    runtime.prewarm("c", layers=[0])
    runtime.prewarm("a", layers=[0], priority=1, deadline=600)
    assert order_of_arrival(runtime) == [("a", 0), ("a", 1), ("b", 1), ("c", 0)]


def test_the_layers_of_a_lease_come_in_order(runtime: Runtime) -> None:
    """A prewarm that asked for the last layer first does not change the order."""
    background = runtime.prewarm("a", layers=[3])
    lease = runtime.lease("a", streaming=True)
    with lease:
        assert order_of_arrival(runtime) == [("a", index) for index in range(4)]
    assert background.done


def test_a_load_without_urgent_tickets_returns_to_the_background(runtime: Runtime) -> None:
    runtime.prewarm("b", layers=[1])
    runtime.prewarm("b", layers=[1], priority=FOREGROUND).cancel()
    runtime.prewarm("c", layers=[0], priority=1)
    assert order_of_arrival(runtime)[0] == ("c", 0)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_background_keeps_its_share_and_no_more(
    device: Device, tmp_path: Path, share: float
) -> None:
    sizes = [GRANULE] * 12
    runtime = device.runtime(
        arena=24 * GRANULE, chunk=GRANULE, staging=2 * GRANULE, pump=True, background_share=share
    )
    for name in ("urgent", "other"):
        runtime.register(name, write_model(tmp_path / name, name, sizes))
    runtime.prewarm("other")
    runtime.prewarm("urgent", priority=FOREGROUND)
    order = order_of_arrival(runtime)
    assert len(order) == 24
    last = max(index for index, (name, _) in enumerate(order) if name == "urgent")
    background = last + 1 - 12
    assert background == pytest.approx(share * (last + 1), abs=1)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_an_invalid_background_share_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match=r"background_share must be in \[0, 1\], got"):
        Runtime(arena="2MiB", background_share=share)


def test_reads_keep_to_their_bandwidth(device: Device, files: dict[str, Path]) -> None:
    runtime = device.runtime(read_bandwidth=20 * GRANULE, loaders=2, chunk="1MiB")
    runtime.register("b", files["b"])
    begin = time.perf_counter()
    runtime.prewarm("b").wait(20)
    assert time.perf_counter() - begin >= 3 / 20 - 0.01
    with pytest.raises(ValueError, match="bandwidth"):
        device.runtime(read_bandwidth=0)


def test_the_descriptor_tells_that_a_backing_changed(runtime: Runtime) -> None:
    descriptor = runtime.fileno()
    assert descriptor == runtime.fileno()

    def changed() -> bool:
        if not select.select([descriptor], [], [], 0)[0]:
            return False
        os.eventfd_read(descriptor)
        return True

    assert not changed()
    epoch = runtime.model("a").backing_epoch
    runtime.prewarm("a", layers=1).wait(20)
    assert changed()
    assert not changed()
    assert runtime.model("a").backing_epoch > epoch
    runtime.evict("a", layers=1)
    assert changed()


def test_an_eviction_waits_as_its_argument_says(device: Device, files: dict[str, Path]) -> None:
    runtime = device.runtime()
    runtime.register("a", files["a"])
    stream = runtime.stream()
    lease = runtime.lease("a", layers=2).acquire(stream)
    for wait in ("nothing", "streams"):
        with pytest.raises(Busy, match="leased"):
            runtime.evict("a", wait=wait)  # type: ignore[arg-type]
    runtime.evict("a", layers=[2, 3], wait="nothing")
    with pytest.raises(TimeoutError):
        runtime.evict("a", wait="leases", timeout=0.05)
    out = device.pinned(GRANULE)
    view = runtime.model("a").layer_bytes(0, 0, GRANULE)
    stream.copy_from(out, view)
    released = threading.Timer(0.1, lease.release)
    released.start()
    runtime.evict("a", wait="leases", timeout=20)
    released.join()
    stream.synchronize()
    assert bytes(out) == content("a", 0, GRANULE)
    runtime.check_invariants()


def test_an_eviction_that_waits_for_nothing_keeps_layers_that_a_stream_uses(
    device: Device, files: dict[str, Path]
) -> None:
    if not device.steps:
        device.simulation["d2h"] = 1e6  # the copy takes seconds, but the clock stands still
    runtime = device.runtime(pump=True)
    runtime.register("a", files["a"])
    stream = runtime.stream()
    lease = runtime.lease("a", layers=1).acquire(stream)
    out = device.pinned(GRANULE)
    device.hold_up(stream)
    stream.copy_from(out, runtime.model("a").layer_bytes(0, 0, GRANULE))
    lease.release()
    with pytest.raises(Busy, match="a stream still uses 'a'"):
        runtime.evict("a", wait="nothing")
    with runtime.lease("a", layers=1):
        pass
    runtime.evict("a", layers=[1, 2], wait="nothing")  # layers that the stream does not use
    stream.synchronize()
    assert np.array_equal(np.frombuffer(content("a", 0, GRANULE), np.uint8), out)
    runtime.evict("a", wait="nothing")
