"""Risk: a computation uses a layer that has not arrived, or waits for a layer that has."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from checkpoints import GRANULE, content, write_model
from conftest import Device, bytes_of, on_the_host

from warmserve_rt import BACKGROUND, Busy, CorruptCheckpoint, Lease, Runtime, StaleView

SIZES = {"a": [GRANULE + 7, 0, GRANULE, 3 * GRANULE], "b": [GRANULE, 100], "c": [5 * GRANULE]}
CAPACITY = 8  # "a" (6) and "b" (2) fit together; "c" (5) fits beside "b"


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    return {name: write_model(tmp_path / name, name, sizes) for name, sizes in SIZES.items()}


def make(device: Device, files: dict[str, Path], **options: object) -> Runtime:
    defaults = {"arena": CAPACITY * GRANULE, "chunk": GRANULE, "staging": 2 * GRANULE}
    made = device.runtime(**{**defaults, **options})
    for name, path in files.items():
        made.register(name, path)
    return made


@pytest.fixture
def runtime(device: Device, files: dict[str, Path]) -> Runtime:
    return make(device, files)


def states(runtime: Runtime, name: str) -> list[str]:
    return [layer.residency for layer in runtime.snapshot().models[name].layers]


def tensor(layer: int) -> str:
    return f"model.layers.{layer}.weight"


def test_a_streaming_lease_begins_before_its_layers_arrive(
    device: Device, files: dict[str, Path]
) -> None:
    runtime = make(device, files, pump=True)
    with runtime.lease("a", streaming=True) as lease:
        assert "resident" not in states(runtime, "a")
        for layer in range(4):
            if states(runtime, "a")[layer] != "resident":
                with pytest.raises(StaleView, match=rf"wait\({layer}\)"):
                    lease.tensors[tensor(layer)]
            lease.wait(layer)
            assert states(runtime, "a")[layer] == "resident"
            assert lease.tensors[tensor(layer)] is not None
            assert bytes_of(runtime, "a", tensor(layer)) == content("a", layer, SIZES["a"][layer])
            if layer < 2:
                assert states(runtime, "a")[3] != "resident"
        lease.wait("model.layers.3")
    assert states(runtime, "a") == ["resident"] * 4


def test_the_stream_waits_instead_of_the_caller(device: Device, files: dict[str, Path]) -> None:
    """On a device with its own streams, the caller continues while the copies still run."""
    if not device.cuda:
        pytest.skip("on the host every copy is complete when the wait returns")
    device.simulation["h2d"] = 1e9
    runtime = make(device, files, pump=True)
    stream = runtime.stream()
    outs = []
    with runtime.lease("a", streaming=True).acquire(stream) as lease:
        for layer in (0, 2, 3):
            lease.wait(layer, stream)
            assert states(runtime, "a")[layer] == "filling"
            nbytes = SIZES["a"][layer]
            outs.append((layer, device.pinned(nbytes)))
            view = runtime.model("a").layer_bytes(layer, 0, nbytes)
            stream.copy_from(outs[-1][1], view)
        lease.record(stream)
    lease.release()
    stream.synchronize()
    for layer, out in outs:
        assert bytes(out) == content("a", layer, SIZES["a"][layer])


def test_layers_can_be_waited_for_in_any_order(device: Device, runtime: Runtime) -> None:
    """Layers are waited for in several orders while loader threads load them."""
    stream = runtime.stream()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0, 3, 1)):
        runtime.evict("a", wait="leases")
        outs = []
        with runtime.lease("a", streaming=True) as lease:
            for layer in order:
                nbytes = SIZES["a"][layer]
                lease.wait(layer, stream, timeout=20)
                outs.append((layer, device.pinned(nbytes or 1)))
                if nbytes:
                    view = runtime.model("a").layer_bytes(layer, 0, nbytes)
                    stream.copy_from(outs[-1][1], view)
            lease.record(stream)
        stream.synchronize()
        for layer, out in outs:
            assert bytes(out)[: SIZES["a"][layer]] == content("a", layer, SIZES["a"][layer])


def test_invalid_waits_are_refused(runtime: Runtime) -> None:
    lease = runtime.lease("a", streaming=True)
    with pytest.raises(StaleView, match="not held"):
        lease.wait(0)
    with lease:
        for layer in (4, -1, "head"):
            with pytest.raises(ValueError, match="no layer"):
                lease.wait(layer)
        with pytest.raises(ValueError, match="not in this lease"):
            lease.wait(0, model=runtime.model("b"))
        native = lease._acquired.latest("wait()").native
    for misuse in (lambda: lease.wait(0), lambda: native.wait_layer(lease.models[0].native, 0)):
        with pytest.raises(StaleView, match=r"not held|released"):
            misuse()
    with (
        runtime.lease(["a", "b"], streaming=True) as both,
        pytest.raises(ValueError, match="several models"),
    ):
        both.wait(0)
    with pytest.raises(StaleView, match="layer 0 of 'a' is not leased"):
        runtime.model("a").wait(0)


def test_a_streaming_lease_can_hold_several_models(runtime: Runtime) -> None:
    with runtime.lease(["a", "b"], streaming=True) as lease:
        for name in ("b", "a"):
            model = runtime.model(name)
            for layer in range(len(SIZES[name])):
                lease.wait(layer, model=model, timeout=20)
                assert lease.of(model)[tensor(layer)] is not None
                assert bytes_of(runtime, name, tensor(layer)) == content(
                    name, layer, SIZES[name][layer]
                )


def test_a_wait_that_times_out_can_be_repeated(device: Device, files: dict[str, Path]) -> None:
    runtime, watched = device.watched_runtime(arena=CAPACITY * GRANULE)
    runtime.register("a", files["a"])
    watched.faults.delay("map", 0.3)
    with runtime.lease("a", streaming=True) as lease:
        with pytest.raises(TimeoutError, match="layer 2 of 'a' did not arrive in time"):
            lease.wait(2, timeout=0.01)
        watched.faults.delay("map", 0.0)
        lease.wait(2, timeout=20)


def test_a_failed_load_keeps_arrived_layers_of_a_streaming_lease(
    device: Device, files: dict[str, Path]
) -> None:
    """Layers that had arrived stay usable to the end of the lease.

    A wait for another layer raises the reason, and the load can be tried again.
    """
    runtime = make(device, files, pump=True)
    runtime.prewarm("a", layers=[0, 2]).wait(20)
    status = files["a"].stat()
    os.utime(files["a"], ns=(1, 1))
    with runtime.lease("a", streaming=True) as lease:
        with pytest.raises(CorruptCheckpoint, match="changed since"):
            lease.wait(3)
        with pytest.raises(CorruptCheckpoint):
            runtime.model("a").wait(3)
        lease.wait(2)
        assert bytes_of(runtime, "a", tensor(2)) == content("a", 2, SIZES["a"][2])
        with pytest.raises(Busy):
            runtime.evict("a", layers=[2])
        assert status.st_size == files["a"].stat().st_size
    runtime.unregister("a")
    runtime.register("a", files["a"])
    with runtime.lease("a"):
        pass


def test_a_lease_that_ends_early_gives_up_the_rest(device: Device, files: dict[str, Path]) -> None:
    runtime = make(device, files, pump=True)
    with runtime.lease("a", streaming=True) as lease:
        lease.wait(2)
    while runtime.step():
        pass
    assert states(runtime, "a") == ["resident", "resident", "resident", "absent"]
    runtime.check_invariants()


def test_an_unregistered_model_keeps_no_stream(device: Device, files: dict[str, Path]) -> None:
    """The stream was recorded for a whole lease, of which one model never arrived."""
    runtime, watched = device.watched_runtime(
        arena=CAPACITY * GRANULE, chunk=GRANULE, staging=2 * GRANULE, pump=True
    )
    for name in "ab":
        runtime.register(name, files[name])
    ticket = runtime.prewarm("a")  # a ticket keeps its model alive
    ticket.cancel()
    stream = runtime.stream()
    lease = runtime.native.begin_lease([runtime.model(name).native for name in "ba"], 0)
    while not lease.arrived(runtime.model("b").native, 1):
        lease.wait_layer(runtime.model("b").native, 1, stream, 20)
    lease.record(stream)
    lease.release()
    assert states(runtime, "a") == ["absent"] * 4
    runtime.unregister("a")
    runtime.unregister("b")
    stream.synchronize()
    del stream, lease
    gc.collect()
    left = dict(watched.strict.live)
    del ticket
    gc.collect()
    assert watched.strict.live == left


def test_a_leased_model_can_record_a_stream(device: Device, files: dict[str, Path]) -> None:
    """An engine may have the model but not the lease."""
    if not device.steps:
        device.simulation["d2h"] = 1e6  # the copy takes seconds, but the clock stands still
    runtime = device.runtime(pump=True)
    model = runtime.register("a", files["a"])
    stream, out = runtime.stream(), device.pinned(GRANULE)
    with pytest.raises(StaleView, match="'a' is not leased"):
        model.record(stream)
    with runtime.lease("a", layers=[0, 1]):
        device.hold_up(stream)
        stream.copy_from(out, model.layer_bytes(0, 0, GRANULE))
        model.record(stream)
    with pytest.raises(Busy, match="a stream still uses 'a'"):
        runtime.evict("a", wait="nothing")
    runtime.prewarm("a").wait()
    runtime.evict("a", layers=[2, 3], wait="nothing")  # layers that were not leased
    stream.synchronize()
    runtime.evict("a", wait="nothing")
    with pytest.raises(StaleView, match="'a' is not leased"):
        model.record(stream)


def test_admission_waits_for_room_and_not_for_layers(
    device: Device, files: dict[str, Path]
) -> None:
    runtime = make(device, files)
    holder = runtime.lease("a").acquire()
    admitted = threading.Event()

    def other() -> None:
        with runtime.lease("c", streaming=True, timeout=20) as lease:
            admitted.set()
            lease.wait(0, timeout=20)
            assert bytes_of(runtime, "c", tensor(0)) == content("c", 0, SIZES["c"][0])

    with ThreadPoolExecutor() as threads:
        done = threads.submit(other)
        assert not admitted.wait(0.1)
        holder.release()
        assert admitted.wait(20)
        done.result(20)


@on_the_host
def test_an_async_lease_streams_too(device: Device, runtime: Runtime) -> None:
    async def use(name: str) -> None:
        async with runtime.lease(name, streaming=True) as lease:
            for layer in range(len(SIZES[name])):
                await asyncio.to_thread(lease.wait, layer)
                found = bytes_of(runtime, name, tensor(layer))
                assert found == content(name, layer, SIZES[name][layer])

    async def main() -> None:
        await asyncio.wait_for(asyncio.gather(*(use(name) for name in "acbcab")), 60)

    asyncio.run(main())


def test_joining_a_shared_lease_does_not_wait_in_line(runtime: Runtime) -> None:
    """A thread that joins needs no more room; if it waited in line, all threads would wait."""
    lease = runtime.lease("a", timeout=20).acquire()
    waiting, served = threading.Event(), threading.Event()

    def stranger() -> None:
        waiting.set()
        with runtime.lease("c", timeout=20):
            served.set()

    def friend() -> None:
        with lease:
            assert bytes_of(runtime, "a", tensor(2)) == content("a", 2, SIZES["a"][2])
            assert not served.is_set()

    with ThreadPoolExecutor() as threads:
        other = threads.submit(stranger)
        assert waiting.wait(20)
        time.sleep(0.1)  # until the other thread waits in line
        for each in [threads.submit(friend) for _ in range(4)]:
            each.result(20)
        assert lease.held
        lease.release()
        other.result(20)
    assert not lease.held


@contextmanager
def joined(lease: Lease, then: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Let another thread join the lease for the duration of the block."""
    entered, leave = threading.Event(), threading.Event()

    def join() -> None:
        with lease:
            entered.set()
            assert leave.wait(20)
            then()

    with ThreadPoolExecutor() as threads:
        other = threads.submit(join)
        assert entered.wait(20)
        try:
            yield
        finally:
            leave.set()
        other.result(20)


def test_a_shared_lease_outlives_its_first_holder(runtime: Runtime) -> None:
    lease = runtime.lease("a", timeout=20).acquire()
    with joined(lease):
        lease.release()
        assert lease.held
        with pytest.raises(Busy):
            runtime.evict("a")
        tensors = lease.tensors
        assert tensors[tensor(0)] is not None
    with pytest.raises(StaleView, match="released"):
        tensors[tensor(0)]
    with pytest.raises(StaleView, match="not held"):
        lease.release()
    runtime.evict("a")


def test_sharers_that_would_wait_for_each_other_are_refused(runtime: Runtime) -> None:
    """Each acquisition belongs to its own thread, and the lease ends with the last of them."""
    lease = runtime.lease("a", timeout=20).acquire()

    def wait_for_myself() -> None:
        with pytest.raises(Busy, match="would wait for this lease"):
            runtime.lease("c", timeout=20).acquire()

    with joined(lease, wait_for_myself):
        lease.release()  # the acquisition of this thread; the other thread's remains
    assert not lease.held


def test_a_lost_streaming_lease_gives_up_its_load(device: Device, files: dict[str, Path]) -> None:
    runtime = make(device, files, pump=True)
    background = runtime.prewarm("b", priority=BACKGROUND)
    lease = runtime.lease("a", streaming=True).acquire()
    lease.acquire()
    with pytest.warns(ResourceWarning, match="'a' was never released"):  # noqa: PT031
        del lease
        gc.collect()
    assert runtime.snapshot().leases == 0
    background.wait(20)
    runtime.evict("a")
