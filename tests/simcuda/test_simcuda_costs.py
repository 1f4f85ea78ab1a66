"""Risk: the simulated driver hides what a change costs: it charges too little, or twice, or lets
work overlap that a GPU's driver does one after the other."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import write_model

from warmserve_rt import Runtime, testing
from warmserve_rt.testing import simulated_cuda
from warmserve_rt.testing.cuda_api import NON_BLOCKING, Cuda
from warmserve_rt.testing.simcuda import SimulatedCuda

G = 2 << 20
US = 1e-6
SLACK = 50 * US  # of a thread's timers, Linux's default


def together(simulated: SimulatedCuda, *works: Callable[[], object]) -> float:
    """Run each in its own thread, all from the same time on; return the time until all end."""
    threads = [threading.Thread(target=work) for work in works]
    begin = simulated.now
    for thread in threads:  # the clock stands while this thread runs
        thread.start()
    for thread in threads:
        thread.join()
    return simulated.now - begin


def concurrent(**options: Any) -> Any:
    return simulated_cuda(memory="256MiB", clock="concurrent", **options)


def mapped(cuda: Cuda, granules: int) -> int:
    """Return addresses at which granules are mapped, without access."""
    address = cuda.reserve(granules * G)
    for i in range(granules):
        cuda.map(address + i * G, G, cuda.create(G))
    return address


MAPPING = {"cuMemMap": (7.7, 0.0), "cuMemSetAccess": (24.0, 30.0), "cuMemUnmap": (12.0, 25.0)}


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("lock", [False, True])
def test_mapping_calls_take_turns(threads: int, lock: bool) -> None:
    turns = threads if lock else 1
    with concurrent(costs=MAPPING, mapping_lock=lock) as simulated:
        cuda = Cuda(simulated.library).start()
        addresses = [cuda.reserve(4 * G) for _ in range(threads)]
        handles = [[cuda.create(G) for _ in range(4)] for _ in range(threads)]

        def map_all(thread: int) -> None:
            for i in range(4):
                cuda.map(addresses[thread] + i * G, G, handles[thread][i])

        def run(work: Callable[[int], object]) -> float:
            return together(simulated, *(lambda t=t: work(t) for t in range(threads)))

        assert run(map_all) == pytest.approx(turns * 4 * 7.7 * US)
        taken = run(lambda thread: cuda.set_access(addresses[thread], 4 * G))
        assert taken == pytest.approx((24 + turns * 4 * 30) * US)
        taken = run(lambda thread: cuda.unmap(addresses[thread], 4 * G))
        assert taken == pytest.approx((12 + turns * 4 * 25) * US)
        assert (simulated.report()["lock_waits"]["mapping"]["calls"] > 0) == (turns > 1)


@pytest.mark.parametrize("clock", ["real", "virtual"])
def test_the_lock_changes_nothing_for_one_thread(clock: Any) -> None:
    with simulated_cuda(memory="64MiB", clock=clock, costs=MAPPING, mapping_lock=True) as simulated:
        cuda = Cuda(simulated.library).start()
        address, begin = mapped(cuda, 4), simulated.now
        cuda.set_access(address, 4 * G)
        taken = simulated.now - begin
        expected = (24 + 4 * 30) * US
        assert taken >= expected if clock == "real" else taken == pytest.approx(expected)


@pytest.mark.parametrize("lock", [False, True])
def test_a_launch_waits_for_a_mapping_call(lock: bool) -> None:
    """With the context's lock an enqueue waits for the whole call, not for one mapping of it."""
    costs = {**MAPPING, "cuMemcpyHtoDAsync": (3.0, 0.0)}
    with concurrent(costs=costs, context_lock=lock, mapping_lock=True) as simulated:
        cuda = Cuda(simulated.library).start()
        context, to, source = cuda.current(), cuda.mapped(G), cuda.pinned(G)
        stream, address = cuda.stream(NON_BLOCKING), mapped(cuda, 8)
        enqueued: list[float] = []

        def enqueue() -> None:
            cuda.set_current(context)
            simulated.sleep(0)  # begins SLACK later: the mapping call holds its locks
            cuda.htod(to, source.address, G, stream)
            enqueued.append(simulated.now)

        begin = simulated.now
        together(simulated, lambda: cuda.set_access(address, 8 * G), enqueue)
        first = SLACK + 3 * US
        assert enqueued[0] - begin == pytest.approx(24 * US + 240 * US + 3 * US if lock else first)
        waits = simulated.report()["lock_waits"]["context"]
        assert waits["calls"] == int(lock)
        assert waits["seconds"] == pytest.approx(24 * US + 240 * US - SLACK if lock else 0)


def test_mapping_is_slower_beside_copies() -> None:
    """The copy takes 200 us: half of the mappings take twice as long."""
    costs = {"cuMemSetAccess": (0.0, 20.0)}
    options = {"costs": costs, "mapping_lock": True, "mapping_beside_copies": 2.0}
    with concurrent(h2d=G / 200e-6, **options) as simulated:
        cuda = Cuda(simulated.library).start()
        to, source, stream = cuda.mapped(G), cuda.pinned(G), cuda.stream(NON_BLOCKING)
        address, alone = mapped(cuda, 10), mapped(cuda, 10)
        begin = simulated.now
        cuda.set_access(alone, 10 * G)
        assert simulated.now - begin == pytest.approx(10 * 20 * US)
        cuda.htod(to, source.address, G, stream)
        begin = simulated.now
        cuda.set_access(address, 10 * G)
        cuda.synchronize(stream)
        assert simulated.now - begin == pytest.approx((5 * 40 + 5 * 20) * US)


@pytest.mark.parametrize("threads", [1, 4, 8])
def test_reads_share_the_memory(threads: int) -> None:
    """One thread reads at most at `read`; a byte takes three bytes of the memory's bandwidth."""
    nbytes = 1 << 20
    with concurrent(read=4e9, dram=60e9) as simulated:
        Cuda(simulated.library).start()
        taken = together(simulated, *[lambda: simulated.host_read(nbytes)] * threads)
    rate = min(4e9, 60e9 / 3 / threads)
    assert taken == pytest.approx(nbytes / rate, abs=1e-8)


def test_a_read_slows_when_others_join() -> None:
    with concurrent(read=4e9, dram=12e9) as simulated:
        Cuda(simulated.library).start()

        def later() -> None:
            simulated.sleep(50 * US)  # with the slack: 100 us
            simulated.host_read(400_000)

        taken = together(simulated, lambda: simulated.host_read(800_000), later)
    # 100 us alone at 4e9 B/s: half of it. Then each reads 400 000 bytes at 2e9.
    assert taken == pytest.approx(300 * US, abs=1e-8)


def test_copies_take_the_memory_of_reads() -> None:
    with concurrent(read=4e9, dram=16e9, h2d=10e9) as simulated:
        cuda = Cuda(simulated.library).start()
        to, source, stream = cuda.mapped(G), cuda.pinned(G), cuda.stream(NON_BLOCKING)
        cuda.htod(to, source.address, G, stream)
        taken = together(simulated, lambda: simulated.host_read(G))
        cuda.synchronize(stream)
    copying = G / 10e9  # meanwhile the reader has 6e9 of the memory: 2e9 bytes read
    assert taken == pytest.approx(copying + (G - 2e9 * copying) / 4e9, abs=1e-8)


def test_every_copy_has_a_start() -> None:
    with concurrent(h2d=10e9, copy_start=5 * US) as simulated:
        cuda = Cuda(simulated.library).start()
        to, source, stream = cuda.mapped(G), cuda.pinned(G), cuda.stream(NON_BLOCKING)
        begin = simulated.now
        for at in range(0, G, G // 4):
            cuda.htod(to + at, source.address + at, G // 4, stream)
        cuda.synchronize(stream)
        assert simulated.now - begin == pytest.approx(4 * 5 * US + G / 10e9, abs=1e-8)


def test_a_sleep_takes_the_time_asked_and_the_slack() -> None:
    with concurrent() as simulated:
        Cuda(simulated.library).start()
        sleeps = [lambda: simulated.sleep(200 * US), lambda: simulated.sleep(5 * US)]
        began = time.perf_counter()
        assert together(simulated, *sleeps) == pytest.approx(200 * US + SLACK)
        assert time.perf_counter() - began < 5


def test_the_clock_stands_while_a_thread_runs() -> None:
    with concurrent() as simulated:
        Cuda(simulated.library).start()
        thread = threading.Thread(target=lambda: simulated.sleep(1 * US))
        begin = simulated.now
        thread.start()
        end = time.perf_counter() + 0.2
        while time.perf_counter() < end:
            assert simulated.now == begin
        thread.join()
        assert simulated.now - begin == pytest.approx(1 * US + SLACK)


def test_the_profile_of_an_h200() -> None:
    """Each cost of the profile, called by one thread, takes what the profile says."""
    with simulated_cuda(profile="h200", memory="256MiB") as simulated:
        cuda = Cuda(simulated.library).start()
        expected = {
            "create": (lambda: cuda.create(G), 13.05),
            "register": (lambda: cuda.pinned(8 * G), 8 * 80.7),
            "enqueue": (lambda: cuda.htod(to, source.address, G, stream), 3.0),
            "record": (lambda: cuda.record(event, stream), 1.0),
            "query": (lambda: cuda.done(event), 1.0),
        }
        address = mapped(cuda, 3)
        for work, cost in (
            (lambda: cuda.set_access(address, 3 * G), 24 + 3 * 30),
            (lambda: cuda.unmap(address, 3 * G), 12 + 3 * 25),
        ):
            begin = simulated.now
            work()
            assert simulated.now - begin == pytest.approx(cost * US)
        to, source = cuda.mapped(G), cuda.pinned(G)
        stream, event = cuda.stream(NON_BLOCKING), cuda.event()
        for name, (work, cost) in expected.items():
            begin = simulated.now
            work()
            assert simulated.now - begin == pytest.approx(cost * US), name
        begin = simulated.now
        cuda.synchronize(stream)
        copied = 2.2 * US + G / 55e9
        assert simulated.now - begin == pytest.approx(copied - 2 * US, abs=1e-8)  # record, query


def test_a_given_cost_replaces_that_of_the_profile() -> None:
    costs = {"cuMemCreate": (1.0, 0.0)}
    with simulated_cuda(profile="h200", clock="virtual", costs=costs, h2d=1e9) as simulated:
        cuda = Cuda(simulated.library).start()
        begin = simulated.now
        cuda.create(G)
        assert simulated.now - begin == pytest.approx(1 * US)


def test_an_unknown_profile_is_refused() -> None:
    with (
        pytest.raises(ValueError, match="profile must be one of h200, got 'b300'"),
        simulated_cuda(profile="b300"),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize("loaders", [1, 2])
def test_a_load_takes_the_time_of_its_reads(tmp_path: Path, loaders: int) -> None:
    """Loaders read at the same time; a load whose reads are the only cost takes their time."""
    layers, nbytes = 4, 8 << 20
    write_model(tmp_path / "m.safetensors", "m", [nbytes] * layers)
    with (
        concurrent(read=1e9) as simulated,
        Runtime(
            driver=testing.cuda_driver(simulated),
            arena="64MiB",
            loaders=loaders,
            tensors="dlpack",
        ) as runtime,
    ):
        model = runtime.register("m", tmp_path / "m.safetensors")
        begin = simulated.now
        runtime.prewarm(model).wait()
        reads = model.nbytes / 1e9 / loaders
        taken = simulated.now - begin
    assert reads <= taken <= reads * 1.05
    assert math.isclose(reads, layers * nbytes / 1e9 / loaders, rel_tol=0.01)
