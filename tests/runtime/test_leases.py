"""Risk: weights are evicted while a lease or a stream uses them, or a waiter waits for ever."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoints import GRANULE, content, write_model
from conftest import Device, address_of, bytes_of

from warmserve_rt import Busy, OutOfDeviceMemory, Runtime, StaleView

SIZES = {"a": [2 * GRANULE, 9], "b": [GRANULE, GRANULE], "c": [3 * GRANULE, 8], "huge": [99 << 20]}
CAPACITY = 5  # "a" (3) and "b" (2) fit together; "c" (4) fits alone


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write_model(folder / name, name, sizes) for name, sizes in SIZES.items()}


@pytest.fixture
def runtime(device: Device, files: dict[str, Path]) -> Runtime:
    made = device.runtime(arena=CAPACITY * GRANULE)
    for name, path in files.items():
        made.register(name, path)
    return made


def assert_content(runtime: Runtime, lease: object, name: str) -> None:
    for tensor in lease.of(runtime.model(name)):  # type: ignore[attr-defined]
        layer = int(tensor.split(".")[2])
        assert bytes_of(runtime, name, tensor) == content(name, layer, SIZES[name][layer])


def test_a_lease_loads_what_is_missing(runtime: Runtime) -> None:
    with runtime.lease("a") as lease:
        assert_content(runtime, lease, "a")


def test_a_lease_on_several_models_is_all_or_nothing(runtime: Runtime) -> None:
    with runtime.lease(["a", "b"]) as lease:
        assert_content(runtime, lease, "a")
        assert_content(runtime, lease, "b")
        with pytest.raises(ValueError, match="several models"):
            _ = lease.tensors
    with pytest.raises(OutOfDeviceMemory, match="budget of 10 MiB"):
        runtime.lease(["a", "c"]).acquire()
    assert runtime.snapshot().leases == 0


def test_a_leased_model_is_never_evicted(runtime: Runtime) -> None:
    with runtime.lease("a") as lease:
        with pytest.raises(Busy, match="'a' is leased"):
            runtime.evict("a")
        with pytest.raises(Busy, match="'a' is leased"):
            runtime.swap(evict="a", load="b")
        with pytest.raises(Busy, match="'a' is leased"):
            runtime.unregister("a")
        with pytest.raises(Busy, match="'a' is leased"):
            runtime.close()
        with pytest.raises(Busy, match=r"'a' 6 MiB \(leased\)"):
            runtime.prewarm("c")
        assert_content(runtime, lease, "a")
    runtime.prewarm("c").wait()


def test_leases_nest_and_outlive_each_other(runtime: Runtime) -> None:
    outer, inner = runtime.lease("a"), runtime.lease("a")
    outer.acquire()
    inner.acquire()
    outer.release()
    with pytest.raises(Busy):
        runtime.evict("a")
    inner.release()
    runtime.evict("a")


def test_the_address_is_the_same_after_evict_and_reload(runtime: Runtime) -> None:
    with runtime.lease("a") as lease:
        address = address_of(lease.tensors["model.layers.0.weight"])
    runtime.swap(evict="a", load="c").wait()
    with runtime.lease("a") as lease:
        assert address_of(lease.tensors["model.layers.0.weight"]) == address
        assert bytes_of(runtime, "a", "model.layers.0.weight") == content("a", 0, SIZES["a"][0])


def test_checked_accessors_refuse_when_the_lease_is_over(runtime: Runtime) -> None:
    lease = runtime.lease("a")
    with pytest.raises(StaleView, match="not held"):
        _ = lease.tensors
    with lease:
        tensors = lease.tensors
        assert len(tensors) == 2
    with pytest.raises(StaleView, match="released"):
        tensors["model.layers.0.weight"]
    with pytest.raises(StaleView, match="released"):
        list(tensors)
    with lease, pytest.raises(StaleView, match="released"):
        tensors["model.layers.0.weight"]  # tensors of the earlier acquisition
    for misuse in (lease.release, lambda: lease.record(runtime.stream())):
        with pytest.raises(StaleView, match="not held"):
            misuse()


def test_the_backing_epoch_tells_that_granules_changed(runtime: Runtime) -> None:
    model = runtime.model("a")
    with runtime.lease(model):
        resident = model.backing_epoch
    with runtime.lease(model):
        assert model.backing_epoch == resident
    runtime.evict(model)
    absent = model.backing_epoch
    assert absent > resident
    with runtime.lease(model):
        assert model.backing_epoch > absent


def test_a_lease_is_held_until_the_last_acquisition_ends(runtime: Runtime) -> None:
    with runtime.lease("a") as lease:
        tensors = lease.tensors
        with lease:
            assert runtime.snapshot().models["a"].leases == 2
        assert lease.held
        assert_content(runtime, lease, "a")
        assert len(list(tensors)) == 2
    assert not lease.held
    runtime.evict("a")


def test_a_thread_that_would_wait_for_itself_is_refused(runtime: Runtime) -> None:
    with runtime.lease("a"), pytest.raises(Busy, match="would wait for this lease"):
        runtime.lease("c").acquire()


def test_one_of_two_leases_that_would_wait_for_each_other_is_refused(runtime: Runtime) -> None:
    """One of the two is refused at once; the other is served when the first releases its lease."""
    outcomes: list[str] = []
    both = threading.Barrier(2)

    def worker(first: str, second: str) -> None:
        with runtime.lease(first):
            both.wait(10)
            try:
                with runtime.lease(second, timeout=20):
                    outcomes.append("served")
            except Busy:
                outcomes.append("refused")

    runtime.register("d", runtime_file(runtime, "c"))
    threads = [threading.Thread(target=worker, args=pair) for pair in (("a", "c"), ("b", "d"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) in (["refused", "refused"], ["refused", "served"])
    runtime.check_invariants()


def runtime_file(runtime: Runtime, name: str) -> Path:
    """Write a second checkpoint with the content of `name` and return its path."""
    import tempfile

    return write_model(Path(tempfile.mkdtemp()) / "copy", name, SIZES[name])


def test_leases_are_served_in_order_of_arrival(runtime: Runtime) -> None:
    """A lease that fits waits behind a larger one that does not, which would otherwise starve."""
    order: list[str] = []
    holder = runtime.lease("a").acquire()

    def worker(name: str) -> None:
        with runtime.lease(name, timeout=20):
            order.append(name)
            time.sleep(0.02)

    threads = []
    for name in ("c", "b", "c"):
        threads.append(threading.Thread(target=worker, args=(name,)))
        threads[-1].start()
        time.sleep(0.1)
    assert order == []
    holder.release()
    for thread in threads:
        thread.join(20)
    assert order == ["c", "b", "c"]


def test_a_lease_that_times_out_holds_nothing(runtime: Runtime) -> None:
    holding, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with runtime.lease("a"):
            holding.set()
            leave.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(10)
    with pytest.raises(TimeoutError, match=r"'a' \d+ \w+ \(leased\).*free and"):
        runtime.lease("c", timeout=0.05).acquire()
    with runtime.lease("b", timeout=20):  # the line is empty
        pass
    leave.set()
    thread.join(20)
    runtime.check_invariants()


def test_work_on_a_stream_outlives_the_release(runtime: Runtime) -> None:
    stream = runtime.stream()
    wanted = content("a", 0, SIZES["a"][0])
    outs = []
    for _ in range(20):
        lease = runtime.lease("a")
        lease.acquire(stream)
        outs.append(np.zeros(len(wanted), np.uint8))
        view = runtime.model("a").layer_bytes(0, 0, len(wanted))
        stream.copy_from(outs[-1], view)
        lease.release()
        runtime.swap(evict="a", load="b").wait()
    stream.synchronize()
    assert all(out.tobytes() == wanted for out in outs)


def test_a_lost_lease_is_released_with_a_warning(runtime: Runtime) -> None:
    lease = runtime.lease("a").acquire()
    with pytest.warns(ResourceWarning, match="'a' was never released"):  # noqa: PT031
        del lease
        gc.collect()
    runtime.evict("a")


def test_async_leases_wait_without_blocking_the_loop(runtime: Runtime) -> None:
    async def use(name: str, order: list[str]) -> None:
        async with runtime.lease(name) as lease:
            order.append(name)
            assert_content(runtime, lease, name)
            await asyncio.sleep(0.01)

    async def main() -> list[str]:
        order: list[str] = []
        await asyncio.gather(*(use(name, order) for name in "acbacb"))
        async with runtime.lease("a"):
            with pytest.raises(Busy, match="would wait"):
                async with runtime.lease("c"):
                    pass
        return order

    assert sorted(asyncio.run(main())) == sorted("acbacb")


def test_an_async_lease_that_is_cancelled_or_late_leaves_the_line(runtime: Runtime) -> None:
    async def wait_for(name: str, timeout: float | None) -> None:
        async with runtime.lease(name, timeout=timeout):
            pass

    async def main() -> None:
        async with runtime.lease("a"):
            waiting = asyncio.create_task(wait_for("c", None))
            await asyncio.sleep(0.05)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            with pytest.raises(TimeoutError):
                await asyncio.create_task(wait_for("c", 0.05))
        async with runtime.lease("c", timeout=20):
            pass

    asyncio.run(main())


class Interrupted(Exception):
    pass


@contextmanager
def busy_stream(device: Device, runtime: Runtime, name: str) -> Iterator[None]:
    """Keep a stream using a model for about a second after its lease ends."""
    stream = runtime.stream()
    nbytes = SIZES[name][0]
    out = device.pinned(nbytes)  # CUDA would wait for each copy to pageable memory
    view = runtime.model(name).layer_bytes(0, 0, nbytes)
    lease = runtime.lease(name)
    lease.acquire(stream)
    device.hold_up(stream)
    for _ in range(5000 if device.name != "cuda:0" else 1):
        stream.copy_from(out, view)
    lease.release()
    try:
        yield
    finally:
        stream.synchronize()
    assert bytes(out) == content(name, 0, nbytes)


@pytest.mark.parametrize("what", ["lease", "ticket", "evict", "unregister"])
def test_signals_are_seen_in_every_wait(device: Device, files: dict[str, Path], what: str) -> None:
    """A signal such as that of Ctrl-C ends the wait, and the runtime's state stays consistent."""
    runtime, watched = device.watched_runtime(arena=CAPACITY * GRANULE)
    for name, path in files.items():
        runtime.register(name, path)
    waits: dict[str, Callable[[], object]] = {
        "lease": lambda: runtime.lease("c").acquire(),
        "ticket": lambda: runtime.prewarm("b").wait(),
        "evict": lambda: runtime.evict("a"),
        "unregister": lambda: runtime.unregister("a"),
    }

    def handler(*_: object) -> None:
        raise Interrupted

    previous = signal.signal(signal.SIGALRM, handler)
    if what in ("lease", "ticket"):
        watched.faults.delay("map", 1.0)
    try:
        with busy_stream(device, runtime, "a"):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupted):
                waits[what]()
            states = runtime.snapshot().models  # the wait ended before the operation was done
            assert states["a"].resident or what == "lease"
            assert not states["c" if what == "lease" else "b"].resident
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    watched.faults.delay("map", 0.0)
    runtime.check_invariants()
    for name in ("a", "b"):
        with runtime.lease(name, timeout=20) as lease:
            assert_content(runtime, lease, name)
