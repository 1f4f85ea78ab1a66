"""What does it cost to use a resident model, and to swap one model for another?

Leases: on resident models of 2 and of 128 layers, while the runtime's loaders are always busy; and
on a simulated CUDA device while another thread maps and unmaps granules.
Swaps: two Llama-shaped models of 1 GiB take turns, once in contiguous granules where possible and
once in granules of which no two are adjacent.
"""

from __future__ import annotations

import argparse
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, perf_counter_ns

from lib.harness import (
    MIB,
    Bench,
    Llama,
    Results,
    huge_share,
    quantile,
    scratch,
    seconds,
    write_checkpoint,
)
from parts.swap.beside_mapping import measure_leases_beside_mapping
from warmserve_rt import Model, Runtime, _native

GRANULE = 2 * MIB
MAPPING = ("unmap", "map", "set_access")
# The models' layers differ in size, so that a swap cannot reuse granules one to one.
LLAMAS = {"a": Llama(2048, 5632, 256, 32000, 9), "b": Llama(1536, 4096, 256, 49152, 15)}
ARENA = 544 * GRANULE  # the larger of the two models plus half a layer
QUICK_LLAMAS = {"a": Llama(512, 1408, 64, 4000, 3), "b": Llama(384, 1024, 64, 6000, 5)}
QUICK_ARENA = 20 * GRANULE


@dataclass(frozen=True)
class Swap:
    """The costs of one swap; `mapping_us` is the time in the driver's mapping calls."""

    granules: int
    seconds: float
    mapping_us: float
    creates: int
    faults: int  # page faults when all of the model is read afterwards


def register(runtime: Runtime, path: Path, shapes: dict[str, tuple[int, ...]]) -> Model:
    write_checkpoint(path, shapes)
    return runtime.register(path.stem, path)


def layers(count: int, granules: int) -> dict[str, tuple[int, ...]]:
    """Return tensors that form `count` layers of `granules` granules each."""
    return {f"layers.{i}.weight": (granules * GRANULE // 2,) for i in range(count)}


def saturate(runtime: Runtime, models: tuple[Model, ...]) -> Iterator[None]:
    """Prewarm models that do not fit into the arena together, forever.

    Each step checks the tickets. This needs no Python thread, which would compete with the
    measurement for the interpreter's lock.
    """
    tickets = [runtime.prewarm(model) for model in models]
    while True:
        for number, model in enumerate(models):
            if tickets[number].done:
                tickets[number] = runtime.prewarm(model)
        yield


def empty_calls(count: int) -> None:
    """Make calls of the extension that do next to nothing."""
    table = _native.TensorTable()
    for _ in range(count):
        len(table)


def measure_leases(bench: Results, directory: Path) -> None:
    count = bench.size(128, 8)
    arena = (2 + count + 3 * count // 2) * GRANULE
    with Runtime(bench.args.device, arena, granule=GRANULE) as runtime:
        few = register(runtime, directory / "few.safetensors", layers(2, 1))
        many = register(runtime, directory / "many.safetensors", layers(count, 1))
        # Loading one is mostly mapping, loading the other mostly copying.
        small = register(runtime, directory / "small.safetensors", layers(count, 1))
        large = register(runtime, directory / "large.safetensors", layers(8, count // 8))
        for model in (few, many):
            runtime.set_keep_value(model, 1.0)
            runtime.prewarm(model).wait()
        lease = runtime.lease(many)

        def whole(model: Model) -> None:
            with runtime.lease(model):
                pass

        def again() -> None:
            lease.acquire()
            lease.release()

        kinds: dict[str, Callable[[], None]] = {
            "few": lambda: whole(few),
            "many": lambda: whole(many),
            "again": again,
        }
        taken: dict[str, list[float]] = {kind: [] for kind in kinds}  # in microseconds
        calls: list[float] = []  # in microseconds; the empty calls into the extension
        background = saturate(runtime, (small, large))
        began, before = perf_counter(), runtime.snapshot().bytes_loaded
        together = bench.size(1000, 10)
        for _ in range(bench.args.leases // together):
            for kind, call in kinds.items():
                for _ in range(together):
                    next(background)
                    begin = perf_counter_ns()
                    call()
                    taken[kind].append((perf_counter_ns() - begin) / 1e3)
            calls.append(seconds(lambda: empty_calls(together)) / together * 1e6)
        loaded = runtime.snapshot().bytes_loaded - before
        bench.row("lease_background_gb_per_s", loaded / (perf_counter() - began) / 1e9, "GB/s")

    few_p50 = quantile(taken["few"], 0.5)
    bench.row("lease_2_layers_p50_us", few_p50, "us")
    bench.row("lease_again_p50_us", quantile(taken["again"], 0.5), "us")
    bench.row("empty_call_us", statistics.median(calls), "us")
    bench.row("lease_resident_p999_us", quantile(taken["many"], 0.999), "us")
    bench.row("lease_resident_max_us", max(taken["many"]), "us")
    p50, p99 = (quantile(taken["many"], q) for q in (0.5, 0.99))
    bench.target("lease_resident_p50_us", p50, "us", "<=", 5)
    bench.row("lease_vs_call", p50 / statistics.median(calls), "times")
    bench.target("lease_resident_p99_us", p99, "us", "<=", 200)
    bench.target("lease_layers_ratio", p50 / few_p50, "times", "<=", 1.5)


def scatter(runtime: Runtime, path: Path) -> None:
    """Occupy every other granule of the arena for good, so that no two others are adjacent."""
    granules = runtime.snapshot().granules
    filler = register(runtime, path, {f"layers.{i}.weight": (1,) for i in range(granules)})
    runtime.prewarm(filler).wait()
    for layer in range(0, granules, 2):
        runtime.set_keep_value(filler, 1.0, layer=layer)


def swap(runtime: Runtime, evict: Model, load: Model) -> Swap:
    before, begin = runtime.snapshot(), perf_counter()
    runtime.swap(evict=evict, load=load).wait()
    taken, after = perf_counter() - begin, runtime.snapshot()

    def calls(name: str) -> tuple[int, int]:
        (count, ns), (count_before, ns_before) = after.driver_calls[name], before.driver_calls[name]
        return count - count_before, ns - ns_before

    with runtime.lease(load) as lease:
        tensors = list(lease.tensors.values())
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for tensor in tensors:
            tensor.reshape(-1)[::1024].max()
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
    mapping_us = sum(calls(name)[1] for name in MAPPING) / 1e3
    granules = after.models[load.name].granules
    return Swap(granules, taken, mapping_us, calls("granule_create")[0], faults)


def measure_swaps(bench: Bench, directory: Path, scattered: bool) -> list[Swap]:
    arena = bench.size(ARENA, QUICK_ARENA) * (2 if scattered else 1)
    with Runtime(bench.args.device, arena, granule=GRANULE, tensors="numpy") as runtime:
        if scattered:
            scatter(runtime, directory / "filler.safetensors")
        a, b = (
            register(runtime, directory / f"{name}.safetensors", llama.shapes())
            for name, llama in bench.size(LLAMAS, QUICK_LLAMAS).items()
        )
        runtime.prewarm(a).wait()
        turns = [(a, b), (b, a)] * (bench.args.swaps // 2 + 1)
        swaps = [swap(runtime, evict, load) for evict, load in turns]
        mappings = Path("/proc/self/maps").read_text().count("warmserve-arena") - 1
        prefix = "scattered_" if scattered else ""
        used = runtime.snapshot().granules - runtime.snapshot().granules_free
        bench.row(f"{prefix}granules_per_mapping", used / mappings, "granules")
        share = huge_share(arena + used * GRANULE)
        bench.row(f"{prefix}arena_huge_share", share, "of the arena")
    return swaps[2:]  # the first swap in each direction is a warm-up


def report_swaps(bench: Bench, swaps: list[Swap], scattered: bool) -> None:
    prefix = "scattered_" if scattered else ""
    per_granule = statistics.median(s.mapping_us / s.granules for s in swaps)
    speed = statistics.median(s.granules * GRANULE / s.seconds / 1e9 for s in swaps)
    share = statistics.median(s.mapping_us / 1e6 / s.seconds for s in swaps)
    bench.row(f"{prefix}swap_ms", 1e3 * statistics.median(s.seconds for s in swaps), "ms")
    bench.row(f"{prefix}swap_gb_per_s", speed, "GB/s")
    bench.row(f"{prefix}swap_mapping_share", share, "of the time")
    faults = sum(s.faults for s in swaps) / sum(s.granules for s in swaps)
    bench.row(f"{prefix}swap_faults_per_granule", faults, "faults")
    if scattered:
        bench.row("scattered_swap_us_per_granule", per_granule, "us")
    else:
        bench.target("swap_us_per_granule", per_granule, "us", "<=", 15)
        bench.target("swap_creates", sum(s.creates for s in swaps), "calls", "=", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--leases", type=int, default=100_000, help="timed leases of each kind")
    parser.add_argument("--swaps", type=int, default=20, help="timed swaps of each kind")
    bench = Bench.start("swap", parser, leases=20, swaps=2)
    with scratch() as directory:
        measure_leases(bench, directory)
        measure_leases_beside_mapping(bench, directory)
        for scattered in (False, True):
            report_swaps(bench, measure_swaps(bench, directory, scattered), scattered)
    bench.finish()


if __name__ == "__main__":
    main()
