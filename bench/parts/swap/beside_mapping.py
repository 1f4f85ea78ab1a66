"""Leases on a resident model while another thread maps and unmaps granules of another model."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_THREAD, getrusage
from threading import Event, Thread
from time import perf_counter, perf_counter_ns

from lib.devices import device
from lib.harness import MIB, Bench, quantile, write_hollow_checkpoint
from warmserve_rt import Model, Runtime, Snapshot

GRANULE = 2 * MIB
CALLS = ("map", "set_access", "unmap")


@contextmanager
def mapping(runtime: Runtime, model: Model) -> Iterator[None]:
    """Load and evict the model in another thread, over and over."""
    stop = Event()

    def work() -> None:
        while not stop.is_set():
            runtime.prewarm(model).wait()
            runtime.evict(model)

    thread = Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def mapping_s(state: Snapshot) -> float:
    """Return the seconds that all threads have spent in mapping calls."""
    return sum(state.driver_calls[name][1] for name in CALLS) / 1e9


@dataclass
class Leases:
    """Timed leases, and how often the thread waited meanwhile, for any lock."""

    us: list[float] = field(default_factory=list)
    waits: int = 0

    def time(self, runtime: Runtime, model: Model, count: int) -> None:
        """Acquire and release leases."""
        before = getrusage(RUSAGE_THREAD).ru_nvcsw
        for _ in range(count):
            begin = perf_counter_ns()
            with runtime.lease(model):
                pass
            self.us.append((perf_counter_ns() - begin) / 1e3)
        self.waits += getrusage(RUSAGE_THREAD).ru_nvcsw - before


def measure_leases_beside_mapping(bench: Bench, directory: Path) -> None:
    """Time leases with and without mapping beside them, in turns.

    On the host, mapping takes a few microseconds, so there a simulated device takes the time of an
    H200 for each call, on the real clock. The other model is in the host cache: its loads are
    mostly mapping.
    """
    name = "simcuda" if bench.args.device == "host" else bench.args.device
    layers = bench.size(128, 8)
    shapes = {f"layers.{i}.weight": (GRANULE // 2,) for i in range(layers)}
    for kind in ("resident", "other"):
        write_hollow_checkpoint(directory / kind, shapes)
    with (
        device(name, profile="h200", clock="real", content=4096, detector=False) as (driver, _),
        Runtime(
            driver=driver,
            arena=2 * layers * GRANULE,
            granule=GRANULE,
            loaders=1,
            host_cache=2 * layers * GRANULE,
            tensors="dlpack",
        ) as runtime,
    ):
        resident = runtime.register("resident", directory / "resident")
        other = runtime.register("other", directory / "other")
        for model in (resident, other):
            runtime.prewarm(model).wait()
        runtime.prewarm(other, to="host").wait()
        together = bench.size(5000, 10)
        alone, beside = Leases(), Leases()
        called = elapsed = 0.0
        for _ in range(bench.args.leases // together):
            alone.time(runtime, resident, together)
            with mapping(runtime, other):
                before, begin = mapping_s(runtime.snapshot()), perf_counter()
                beside.time(runtime, resident, together)
                called += mapping_s(runtime.snapshot()) - before
                elapsed += perf_counter() - begin
    bench.row("mapping_beside_leases", called / elapsed, "of the time")
    for kind, leases in (("without_mapping", alone), ("beside_mapping", beside)):
        bench.row(f"lease_{kind}_p50_us", statistics.median(leases.us), "us")
        waits = leases.waits / len(leases.us)
        bench.row(f"lease_{kind}_waits", waits, "for each lease")
    bench.row("lease_without_mapping_p99_us", quantile(alone.us, 0.99), "us")
    bench.row("lease_beside_mapping_p999_us", quantile(beside.us, 0.999), "us")
    bench.target("lease_beside_mapping_p99_us", quantile(beside.us, 0.99), "us", "<=", 100)
