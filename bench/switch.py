"""How long does it take to switch from one model to another, and where does the time go?

    python bench/switch.py --device simcuda

Two models of 2.2 GB, and two of 13.5 GB, take turns in an arena for one of them. Their checkpoints
are files without content in the page cache. The simulated device has the costs of an H200, on a
clock on which those of several threads overlap, and keeps the first bytes of each granule only.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from lib.devices import device
from lib.harness import MIB, Bench, scratch, write_hollow_checkpoint
from parts.switch.models import LARGE, SMALL, arena_for, shortened, waste
from warmserve_rt import Model, Runtime
from warmserve_rt.testing.simcuda import SimulatedCuda

LINK = 55e9  # bytes per second
MEMORY = Path("/dev/shm")  # a hole in a file of this file system reads as zeros, without memory
DEFAULT = 2  # MiB of a runtime's granule, unless it is told otherwise
# GB/s of a 2.2 GB model that an H200 reached, by the MiB of a granule (bench/README.md, gpu.sh).
MEASURED_LOADS = {
    4: {2: 17.0, 8: 19.0, 16: 18.0},
    8: {2: 27.0, 8: 31.0, 16: 32.0},
    12: {2: 31.0, 8: 34.0, 16: 36.0},
}
SWAPPERS = 8  # loaders
MEASURED_SWAPS = {2: 22.0, 8: 30.0, 16: 33.0}


@dataclass(frozen=True)
class Turn:
    """Two models of the same file in an arena for one of them; `a` is resident at first."""

    runtime: Runtime
    models: tuple[Model, Model]
    now: Callable[[], float]  # seconds of the device's clock
    cuda: SimulatedCuda | None

    @property
    def nbytes(self) -> int:
        return self.models[0].nbytes


@contextmanager
def turn(bench: Bench, path: Path, granule: int, loaders: int) -> Iterator[Turn]:
    """Yield two models that take turns; `granule` in MiB."""
    with (
        device(bench.args.device, profile="h200", memory="24GiB", content=4096, detector=False) as (
            driver,
            cuda,
        ),
        Runtime(
            driver=driver,
            arena=arena_for(path, granule * MIB),
            granule=granule * MIB,
            loaders=loaders,
            tensors="dlpack",
        ) as runtime,
    ):
        a, b = (runtime.register(name, path) for name in "ab")
        runtime.prewarm(a).wait()  # pins the staging memory
        yield Turn(runtime, (a, b), (lambda: cuda.now) if cuda else perf_counter, cuda)


def load(at: Turn) -> float:
    """Return the seconds of a load into granules that are free."""
    at.runtime.evict(at.models[0])
    begin = at.now()
    at.runtime.prewarm(at.models[0]).wait()
    return at.now() - begin


def swap(at: Turn, streaming: bool = False) -> tuple[float, float]:
    """Exchange the models.

    Returns the seconds until all of the new model is resident and, with a streaming lease, those
    until its first layer may be used.
    """
    resident = [at.runtime.snapshot().models[each.name].granules > 0 for each in at.models]
    evict, incoming = at.models if resident[0] else at.models[::-1]
    first, begin = 0.0, at.now()
    ticket = at.runtime.swap(evict=evict, load=incoming)
    if streaming:
        with at.runtime.lease(incoming, streaming=True) as lease:
            lease.wait(0)
            first = at.now() - begin
            ticket.wait()
    ticket.wait()
    return at.now() - begin, first


def over_copy(at: Turn, seconds: float) -> float:
    """Return a time relative to that of copying layer 0."""
    return seconds / (at.models[0].layers[0].nbytes / LINK)


def padding(at: Turn) -> float:
    """Return the share of the bytes that a load copies and no tensor occupies."""
    assert at.cuda
    before = at.cuda.copied["h2d"]
    swap(at)
    return 1 - at.nbytes / (at.cuda.copied["h2d"] - before)


def small(bench: Bench, path: Path) -> None:
    """Measure what an H200 was measured with, and compare the simulated device with it."""
    far = {}

    def speed(name: str, taken: list[float], nbytes: int, measured: float) -> None:
        reached = nbytes / statistics.median(taken) / 1e9
        bench.row(f"{name}_gb_per_s", reached, "GB/s")
        far[name] = abs(reached / measured - 1)

    rounds = range(bench.args.rounds)
    for loaders, by_granule in MEASURED_LOADS.items():
        for granule, measured in by_granule.items():
            with turn(bench, path, granule, loaders) as at:
                taken = [load(at) for _ in rounds]
                speed(f"load_{loaders}_loaders_{granule}MiB", taken, at.nbytes, measured)
                if loaders != SWAPPERS:
                    continue
                taken = [swap(at)[0] for _ in rounds]
                speed(f"swap_{granule}MiB", taken, at.nbytes, MEASURED_SWAPS[granule])
                first = over_copy(at, statistics.median(swap(at, True)[1] for _ in rounds))
                bench.row(f"first_layer_vs_copy_{granule}MiB", first, "times")
                if at.cuda:
                    share = padding(at)
                    bench.row(f"link_padding_share_{granule}MiB", share, "")
                if granule == DEFAULT:
                    bench.target("first_layer_vs_copy", first, "times", "<=", 1.3)
                    if at.cuda:
                        bench.target("link_padding_share", share, "", "<=", 0.002)
    bench.target("simulated_vs_h200_max", max(far.values()), "", "<=", 0.1)


def large(bench: Bench, path: Path) -> None:
    """Measure swaps of the larger models, from the first layer to the last."""
    for granule in min(MEASURED_SWAPS), max(MEASURED_SWAPS):
        with turn(bench, path, granule, SWAPPERS) as at:
            taken, first = swap(at, streaming=True)
            bench.row(f"swap_13gb_{granule}MiB_gb_per_s", at.nbytes / taken / 1e9, "GB/s")
            bench.row(f"first_layer_vs_copy_13gb_{granule}MiB", over_copy(at, first), "times")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="loads and swaps of each kind")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the models' blocks (default: 1)"
    )
    bench = Bench.start("switch", parser)
    simulated = bench.args.device == "simcuda"
    with scratch(MEMORY if simulated and MEMORY.is_dir() else None) as folder:
        shares = waste(folder, DEFAULT * MIB)
        for kind, share in shares.items():
            bench.row(f"arena_waste_share_{kind}", share, "")
        bench.target("arena_waste_share_max", max(shares.values()), "", "<=", 0.05)
        for measure, model in ((small, SMALL), (large, LARGE)):
            path = folder / f"{measure.__name__}.safetensors"
            write_hollow_checkpoint(path, shortened(model, bench.args.share).shapes())
            measure(bench, path)
            path.unlink()
    bench.finish()


if __name__ == "__main__":
    main()
