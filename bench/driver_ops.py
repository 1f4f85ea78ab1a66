"""What do a device's memory operations cost, and how much do they slow down a load?

    python bench/driver_ops.py --device simcuda
    python bench/driver_ops.py --device cuda:0

On every device the bench times create, map, set access, unmap and release per granule, by the size
of the granule and the number of granules in a call. On the simulated device, whose costs are known,
it also measures loads relative to the bandwidth, the calls before a first layer, and the
simulator's own speed and race detection.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from lib.devices import device
from lib.harness import (
    LLAMA_2GIB,
    MIB,
    Bench,
    Llama,
    scratch,
    seconds,
    write_checkpoint,
    write_hollow_checkpoint,
)
from lib.simulated import BANDWIDTH, COSTS
from lib.support import SUPPORT
from warmserve_rt import FOREGROUND, Model, Runtime, _native, testing
from warmserve_rt.checkpoint import open_checkpoint
from warmserve_rt.checkpoint.layout import LayerSpec, build_layout
from warmserve_rt.testing.simcuda import SimulatedCuda

LLAMA_7B = Llama(4096, 11008, 4096, 32000, 32)  # 13.5 GB in bf16
SHORT = Llama(2048, 5632, 256, 32000, 8)  # 1 GB
QUICK = Llama(512, 1408, 64, 8000, 8)  # 60 MB, in 8 + 8 * 3 granules
GRANULE = "2MiB"  # of the runtimes
CALLS = ((2, 1), (2, 8), (2, 64), (2, 256), (8, 64), (32, 16))  # MiB of a granule, granules

MEMORY_CALLS = (
    "cuMemCreate",
    "cuMemRelease",
    "cuMemAddressReserve",
    "cuMemAddressFree",
    "cuMemMap",
    "cuMemUnmap",
    "cuMemSetAccess",
)
SAMPLE = 4096  # bytes of each granule that the simulator keeps


def driver_ops(bench: Bench) -> None:
    """Time the operations in microseconds per granule; "ro": mapped read-only."""
    with device(bench.args.device, memory="8GiB") as (driver, _):
        for mib, batch in bench.size(CALLS, CALLS[:2]):
            rounds = bench.size(max(3, 256 // batch), 1)
            for writable in (True, False):
                taken = _native.time_driver(
                    driver, granule=mib * MIB, batch=batch, rounds=rounds, writable=writable
                )
                kind = "rw" if writable else "ro"
                for name in ("create", "map", "set_access", "unmap", "release"):
                    if not writable and name in ("create", "release"):
                        continue
                    times = 1 if name in ("create", "release") else rounds
                    bench.row(
                        f"{name}_{kind}_{mib}MiB_x{batch}",
                        taken[name] / times / batch * 1e6,
                        "us/granule",
                    )


def samples(layer: LayerSpec) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
    """Yield, for each granule of a layer, its offset in the layer and the pieces of its sample.

    The sample is the start of the granule. A piece is (file offset, offset in the sample, bytes).
    """
    for granule in range(0, layer.nbytes, 2 * MIB):
        end = min(granule + SAMPLE, layer.nbytes)
        pieces = []
        for segment in layer.segments:
            begin = max(granule, segment.layer_offset)
            stop = min(end, segment.layer_offset + segment.nbytes)
            if begin < stop:
                at = segment.file_offset + begin - segment.layer_offset
                pieces.append((at, begin - granule, stop - begin))
        yield granule, pieces


def write_marked_checkpoint(path: Path, llama: Llama) -> int:
    """Write a file with random bytes at the start of each granule, holes elsewhere."""
    nbytes = write_hollow_checkpoint(path, llama.shapes())
    with closing(open_checkpoint(path)) as opened:
        layout = build_layout(opened)
    with path.open("r+b") as file:
        for layer in layout.layers:
            for _, pieces in samples(layer):
                for at, _, size in pieces:
                    file.seek(at)
                    file.write(os.urandom(size))
    return nbytes


def sample_matches(cuda: SimulatedCuda, model: Model, path: Path) -> bool:
    """Return whether the start of every granule on the device equals the file's bytes."""
    with path.open("rb") as file:
        for layer in model.layers:
            address = model.layer_bytes(layer.index).address
            for granule, pieces in samples(layer):
                wanted = bytearray(min(SAMPLE, layer.nbytes - granule))
                for at, into, size in pieces:
                    file.seek(at)
                    wanted[into : into + size] = file.read(size)
                if cuda.peek(address + granule, len(wanted)) != bytes(wanted):
                    return False
    return True


def load_at_bandwidth(bench: Bench, folder: Path) -> None:
    """Measure foreground and background loads relative to the bandwidth, on the virtual clock.

    Calls cost COSTS, copies run at BANDWIDTH and reading the file is free. The remaining time is
    due to the runtime's order of calls and copies. In the background at most one chunk is in
    flight.
    """
    path = folder / "llama-7b"
    nbytes = write_marked_checkpoint(path, bench.size(LLAMA_7B, QUICK))
    arena = bench.size("13.25GiB", "80MiB")
    with device(
        "simcuda", memory="16GiB", clock="virtual", h2d=BANDWIDTH, costs=COSTS, content=SAMPLE
    ) as (driver, cuda):
        assert cuda
        with runtime_on(driver, arena, "256MiB", pump=True) as runtime:
            start_up = cuda.now
            model = runtime.register("llama", path)
            before = cuda.calls
            runtime.prewarm(model, priority=FOREGROUND).wait()
            taken = cuda.now - start_up
            bench.row("arena_start_up", start_up, "s")
            bench.row("load_gb", nbytes / 1e9, "GB")
            bench.row("load", taken, "s")
            bench.target("load_vs_bandwidth", taken / (model.nbytes / BANDWIDTH), "x", "<=", 1.03)
            calls = {name: cuda.calls.get(name, 0) - before.get(name, 0) for name in MEMORY_CALLS}
            bench.row("load_memory_calls", sum(calls.values()), "calls")
            granules = sum(layer.granules for layer in runtime.snapshot().models["llama"].layers)
            one = sum(sum(COSTS[name]) for name in ("cuMemMap", "cuMemSetAccess"))
            bench.row("one_by_one_would_cost", one * granules * 1e-6, "s")
            bench.target(
                "load_sample_matches", float(sample_matches(cuda, model, path)), "", "=", 1
            )
            bench.row("copied_h2d_gb", cuda.copied["h2d"] / 1e9, "GB")
            runtime.evict(model)
            begin = cuda.now
            runtime.prewarm(model).wait()
            behind = (cuda.now - begin) / (model.nbytes / BANDWIDTH)
            bench.row("background_load_vs_bandwidth", behind, "x")


def runtime_on(driver: _native.Driver, arena: str, staging: str, **options: Any) -> Runtime:
    """Return a runtime whose granules are those of the rows."""
    return Runtime(
        driver=driver,
        arena=arena,
        staging=staging,
        granule=GRANULE,
        max_padding=1,
        tensors="dlpack",
        **options,
    )


def load_on_a_real_clock(bench: Bench, folder: Path) -> None:
    """Measure a load in real time, with threads, at a bandwidth that this machine can sustain.

    This shows whether file reads, copies and calls overlap. It is a comparison without a target.
    """
    bandwidth = 2e9
    path = folder / "llama-1b"
    write_checkpoint(path, bench.size(LLAMA_2GIB, QUICK).shapes())
    arena = bench.size("2200MiB", "80MiB")
    with (
        device("simcuda", memory="3GiB", h2d=bandwidth, costs=COSTS) as (driver, _),
        runtime_on(driver, arena, "256MiB", loaders=1) as runtime,
    ):
        model = runtime.register("llama", path)
        runtime.prewarm(model).wait()  # pins the staging memory
        runtime.evict(model)
        taken = seconds(lambda: runtime.prewarm(model, priority=FOREGROUND).wait())
        bench.row("real_clock_gb_per_s", bandwidth / 1e9, "GB/s")
        bench.row("real_clock_load_vs_bandwidth", taken / (model.nbytes / bandwidth), "x")


def activation(bench: Bench, folder: Path) -> None:
    """Count the memory calls until the first layer of a partly resident model is mapped.

    The arena is full: it holds one model and the tail layers of another. The bench then leases the
    second model and counts calls until its first layer is mapped and its copies are in flight.
    """
    shapes = bench.size(SHORT, QUICK).shapes()
    for name in "ab":
        write_hollow_checkpoint(folder / name, shapes)
    arena = bench.size("1400MiB", "96MiB")
    with device("simcuda", memory="8GiB", clock="virtual", h2d=BANDWIDTH, costs=COSTS) as (
        driver,
        cuda,
    ):
        assert cuda
        with runtime_on(driver, arena, "128MiB", pump=True) as runtime:
            for name in "ab":
                runtime.register(name, folder / name)
            runtime.prewarm("b").wait()
            for layer in runtime.model("b").layers:
                runtime.set_keep_value("b", float(layer.index), layer=layer.index)
            runtime.set_keep_value("a", 100.0)
            runtime.prewarm("a").wait()  # takes the first layers of "b"
            runtime.set_keep_value("a", -1.0)
            layers = runtime.snapshot().models["b"].layers
            assert layers[0].residency == "absent"
            assert layers[-1].residency == "resident"
            before, copied, now = cuda.calls, cuda.copied["h2d"], cuda.now
            stream = runtime.stream()
            with runtime.lease("b", streaming=True) as lease:
                lease.wait(0, stream)
                used = cuda.now - now
                calls = sum(cuda.calls.get(n, 0) - before.get(n, 0) for n in MEMORY_CALLS)
                whole = layers[0].granules * 2 * MIB
                assert cuda.copied["h2d"] - copied < whole  # the copies are still in flight
            bench.row("layer0_granules", layers[0].granules, "")
            bench.row("layers_missing", sum(x.residency == "absent" for x in layers), "")
            bench.row("activation_until_mapped", used * 1e6, "us")
            bench.target(
                "activation_calls_before_layer0", calls, "calls", "<=", 2 + layers[0].granules
            )
            del stream


def simulator(bench: Bench) -> None:
    best = 0.0
    with device("simcuda") as (driver, _):
        for _ in range(bench.size(5, 1)):
            rounds = bench.size(200_000, 200)
            taken = _native.time_driver(driver, granule=2 * MIB, batch=1, rounds=rounds)
            best = max(best, rounds / taken["cycles"])
    bench.target("sim_cycles_per_s", best, "1/s", ">=", 500_000)
    sys.path.append(str(SUPPORT))
    import stream_programs

    expected = found = false = 0
    for seed in range(bench.args.programs):
        program = stream_programs.generate(seed)
        if seed % 2:  # a race-free program from which one ordering was removed
            free = stream_programs.generate(seed, race_free=True)
            program = stream_programs.plant(free, seed) or free
        with testing.simulated_cuda(clock="virtual", check=False) as cuda:
            observed = stream_programs.observed_races(cuda, program)
        races = stream_programs.expected_races(program, observed.completed)
        expected += len(races)
        found += len(races & observed.races)
        false += len(observed.races - races)
    bench.row("programs", bench.args.programs, "")
    bench.row("races_planted", expected, "")
    bench.target("races_found_share", found / expected, "", "=", 1)
    bench.target("false_races", false, "", "=", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=2000, help="random programs with races")
    bench = Bench.start("driver_ops", parser, programs=8)
    print(f"driver operations on {bench.args.device}", flush=True)
    driver_ops(bench)
    if bench.args.device == "simcuda":
        print(
            f"paced at {BANDWIDTH / 1e9:g} GB/s on a virtual clock; a call costs, in us, "
            + ", ".join(f"{name} {a:g} + {b:g} x granules" for name, (a, b) in COSTS.items()),
            flush=True,
        )
        with scratch() as folder:
            load_at_bandwidth(bench, folder)
            load_on_a_real_clock(bench, folder)
            activation(bench, folder)
        simulator(bench)
    bench.finish()


if __name__ == "__main__":
    main()
