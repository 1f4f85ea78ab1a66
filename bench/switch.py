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

from lib.bound import Bound
from lib.devices import device
from lib.harness import MIB, Bench, scratch, write_hollow_checkpoint
from lib.simulated import computation
from parts.switch.models import LARGE, SMALL, arena_for, cache_for, shortened, waste
from warmserve_rt import Model, Runtime
from warmserve_rt.core.devices import usual_granules
from warmserve_rt.testing.simcuda import SimulatedCuda

LINK = 55e9  # bytes per second
MEMORY = Path("/dev/shm")  # a hole in a file of this file system reads as zeros, without memory
GRANULES = (2, 8, 16)  # MiB
CACHED_GRANULE = usual_granules(cuda=True).nbytes // MIB  # the targets are those of the default
LOADERS = (4, 8, 12)
SWAPPERS, FEW = 8, 2  # loaders
RATIOS = (0.5, 1.0, 4.0)  # of copying a model to computing it
COMPUTED = 20e6  # bytes per second; slow copies to the host stand for computation


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

    def next(self) -> tuple[Model, Model]:
        """Return the model to evict and the model to load."""
        resident = self.runtime.snapshot().models[self.models[0].name].granules > 0
        return self.models if resident else (self.models[1], self.models[0])


@contextmanager
def turn(
    bench: Bench,
    path: Path,
    granule: int,
    loaders: int,
    cached: bool = False,
    d2h: float | None = None,
) -> Iterator[Turn]:
    """Yield two models that take turns; `granule` in MiB.

    With `cached` both are in the host cache. `d2h` is the speed of the simulated device's copies to
    the host (default: the profile's).
    """
    with (
        device(
            bench.args.device,
            profile="h200",
            memory="24GiB",
            content=4096,
            detector=False,
            d2h=d2h,
        ) as (driver, cuda),
        Runtime(
            driver=driver,
            arena=arena_for(path, granule * MIB),
            granule=granule * MIB,
            loaders=loaders,
            host_cache=cache_for(path) if cached else 0,
            tensors="dlpack",
        ) as runtime,
    ):
        a, b = (runtime.register(name, path) for name in "ab")
        runtime.prewarm(a).wait()  # pins the staging memory
        if cached:
            for model in (a, b):
                runtime.prewarm(model, to="host").wait()
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
    evict, incoming = at.next()
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


def first_token(at: Turn, ratio: float) -> float:
    """Return the time to first token of a streaming start that evicts the other model, relative to
    the least that any loader could reach.

    Copying the model takes `ratio` times as long as computing it.
    """
    assert at.cuda
    evict, incoming = at.next()
    layers = [layer.nbytes for layer in incoming.layers]
    read = round(at.nbytes / LINK / ratio / len(layers) * COMPUTED)
    bound = Bound([read / COMPUTED] * len(layers), layers, LINK)
    stream = at.runtime.stream()
    with computation(at.cuda, incoming, stream, read) as compute:
        begin = at.now()
        ticket = at.runtime.swap(evict=evict, load=incoming)
        with at.runtime.lease(incoming, streaming=True) as lease:
            compute(lease)
            taken = at.now() - begin
        ticket.wait()
    return taken / bound.seconds(kept=0)


def small(bench: Bench, path: Path) -> None:
    """Measure what an H200 was measured with (bench/README.md)."""

    def speed(name: str, taken: list[float], nbytes: int) -> None:
        bench.row(f"{name}_gb_per_s", nbytes / statistics.median(taken) / 1e9, "GB/s")

    rounds = range(bench.args.rounds)
    for loaders in bench.size(LOADERS, (SWAPPERS,)):
        for granule in GRANULES:
            with turn(bench, path, granule, loaders) as at:
                taken = [load(at) for _ in rounds]
                speed(f"load_{loaders}_loaders_{granule}MiB", taken, at.nbytes)
                if loaders != SWAPPERS:
                    continue
                speed(f"swap_{granule}MiB", [swap(at)[0] for _ in rounds], at.nbytes)
                first = over_copy(at, statistics.median(swap(at, True)[1] for _ in rounds))
                bench.row(f"first_layer_vs_copy_{granule}MiB", first, "times")
                if at.cuda and granule == max(GRANULES):
                    bench.target("link_padding_share", padding(at), "", "<=", 0.002)
    cached(bench, path)


def cached(bench: Bench, path: Path) -> None:
    """Measure swaps of models that are in the host cache."""
    rounds = range(bench.args.rounds)
    for granule in GRANULES:
        with turn(bench, path, granule, SWAPPERS, cached=True) as at:
            share = at.nbytes / LINK / statistics.median(swap(at)[0] for _ in rounds)
            first = over_copy(at, statistics.median(swap(at, True)[1] for _ in rounds))
            bench.row(f"cached_swap_vs_link_{granule}mib", share, "")
            bench.row(f"cached_first_layer_vs_copy_{granule}MiB", first, "times")
            if granule == CACHED_GRANULE:
                bench.target("cached_swap_vs_link", share, "", ">=", 0.95)
                bench.target("first_layer_vs_copy", first, "times", "<=", 1.3)
            misses = at.runtime.snapshot().host_cache.misses
            assert misses == len(at.models[0].layers), "a swap has read a file"
    if bench.args.device == "simcuda":
        streaming_starts(bench, path)


def streaming_starts(bench: Bench, path: Path) -> None:
    """Measure times to first token of a model that is in the host cache."""
    worst: dict[int, float] = {}
    for loaders in FEW, SWAPPERS:
        with turn(bench, path, CACHED_GRANULE, loaders, cached=True, d2h=COMPUTED) as at:
            for ratio in RATIOS:
                found = statistics.median(first_token(at, ratio) for _ in range(bench.args.rounds))
                bench.row(f"ttft_vs_bound_{loaders}_loaders_ratio_{ratio:g}", found, "times")
                worst[loaders] = max(worst.get(loaders, 0.0), found)
    bench.target("ttft_vs_bound_cached", worst[SWAPPERS], "times", "<=", 1.05)


def large(bench: Bench, path: Path) -> None:
    """Measure swaps of the larger models, from the first layer to the last."""
    for granule in min(GRANULES), max(GRANULES):
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
    bench = Bench.start("switch", parser, share=0.0)
    simulated = bench.args.device == "simcuda"
    with scratch(MEMORY if simulated and MEMORY.is_dir() else None) as folder:
        shares = waste(folder, usual_granules(cuda=True))
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
