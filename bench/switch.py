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
from lib.harness import MIB, Bench, Llama, scratch, write_hollow_checkpoint
from parts.switch.models import TURNS, arena_for, shortened, waste
from warmserve_rt import Model, Runtime
from warmserve_rt.testing.simcuda import SimulatedCuda

LINK = 55e9  # bytes per second
DEFAULT = 2  # MiB of a runtime's granule, unless it is told otherwise
# GB/s of a 2.2 GB model that an H200 reached, by the MiB of a granule (bench/README.md, gpu.sh).
MEASURED_LOADS = {
    4: {2: 17.0, 8: 19.0, 16: 18.0},
    8: {2: 27.0, 8: 31.0, 16: 32.0},
    12: {2: 31.0, 8: 34.0, 16: 36.0},
}
MEASURED_SWAPS = {2: 22.0, 8: 30.0, 16: 33.0}  # with eight loaders


@dataclass(frozen=True)
class Turn:
    """Two models in an arena for one of them; `a` is resident."""

    runtime: Runtime
    a: Model
    b: Model
    now: Callable[[], float]  # seconds of the device's clock
    cuda: SimulatedCuda | None


@contextmanager
def turn(bench: Bench, path: Path, granule: int, loaders: int) -> Iterator[Turn]:
    """Yield two models of the same file; `granule` in MiB."""
    options = {"profile": "h200", "memory": "24GiB", "content": 4096, "detector": False}
    with (
        device(bench.args.device, **options) as (driver, cuda),
        Runtime(
            driver=driver,
            arena=arena_for(path, granule * MIB),
            granule=granule * MIB,
            loaders=loaders,
            tensors="dlpack",
        ) as runtime,
    ):
        now = (lambda: cuda.now) if cuda else perf_counter
        a, b = (runtime.register(name, path) for name in "ab")
        runtime.prewarm(a).wait()  # pins the staging memory
        yield Turn(runtime, a, b, now, cuda)


def load(at: Turn) -> float:
    """Return the seconds of a load into granules that are free."""
    at.runtime.evict(at.a)
    begin = at.now()
    at.runtime.prewarm(at.a).wait()
    return at.now() - begin


def swap(at: Turn) -> float:
    """Return the seconds of a swap until all of the model is resident; swap back."""
    begin = at.now()
    at.runtime.swap(evict=at.a, load=at.b).wait()
    taken = at.now() - begin
    at.runtime.swap(evict=at.b, load=at.a).wait()
    return taken


def first_layer(at: Turn) -> float:
    """Return the time of a swap until layer 0 may be used, over that of copying the layer."""
    begin = at.now()
    ticket = at.runtime.swap(evict=at.a, load=at.b)
    with at.runtime.lease(at.b, streaming=True) as lease:
        lease.wait(0)
        taken = at.now() - begin
    ticket.wait()
    at.runtime.swap(evict=at.b, load=at.a).wait()
    return taken / (at.b.layers[0].nbytes / LINK)


def padding(at: Turn) -> float:
    """Return the share of the bytes copied by a load that no tensor occupies."""
    assert at.cuda
    before = at.cuda.copied["h2d"]
    load(at)
    return 1 - at.a.nbytes / (at.cuda.copied["h2d"] - before)


def median(work: Callable[[Turn], float], at: Turn, rounds: int) -> float:
    return statistics.median(work(at) for _ in range(rounds))


def speeds(bench: Bench, path: Path, size: str, loads: dict[int, dict[int, float]]) -> None:
    """Measure loads by loaders and granules, and swaps with eight loaders.

    `loads` names them; on the simulated device the full 2.2 GB are compared with its figures.
    """
    rounds, far = bench.args.rounds, []
    for loaders, by_granule in loads.items():
        for granule, measured in by_granule.items():
            with turn(bench, path, granule, loaders) as at:
                rows = {f"load_{size}_{loaders}_loaders_{granule}MiB": (load, measured)}
                if loaders == 8:
                    rows[f"swap_{size}_{granule}MiB"] = (swap, MEASURED_SWAPS[granule])
                for name, (work, expected) in rows.items():
                    speed = at.a.nbytes / median(work, at, rounds) / 1e9
                    bench.row(f"{name}_gb_per_s", speed, "GB/s")
                    far.append(abs(speed / expected - 1))
                if loaders == 8 and at.cuda:
                    bench.row(f"first_layer_{size}_{granule}MiB", first_layer(at), "times")
                    bench.row(f"padding_{size}_{granule}MiB", padding(at), "of the bytes")
    if size == "2gb":
        bench.target("simulated_vs_h200_max", max(far), "", "<=", 0.1)


def ideal(bench: Bench, path: Path) -> None:
    """Compare a runtime with default granules with the least that the link allows."""
    with turn(bench, path, DEFAULT, 8) as at:
        first = median(first_layer, at, bench.args.rounds)
        bench.target("first_layer_vs_copy", first, "times", "<=", 1.3)
        if at.cuda:
            bench.target("link_padding_share", padding(at), "", "<=", 0.002)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="loads and swaps of each kind")
    parser.add_argument(
        "--share", type=float, default=1.0, help="share of the models' blocks (default: 1)"
    )
    bench = Bench.start("switch", parser)
    models: dict[str, Llama] = {
        size: shortened(model, bench.args.share) for size, model in TURNS.items()
    }
    with scratch() as folder:
        shares = waste(folder, DEFAULT * MIB)
        for kind, share in shares.items():
            bench.row(f"arena_waste_share_{kind}", share, "")
        bench.target("arena_waste_share_max", max(shares.values()), "", "<=", 0.05)
        for size, model in models.items():
            path = folder / f"{size}.safetensors"
            write_hollow_checkpoint(path, model.shapes())
            if size == "2gb":
                speeds(bench, path, size, MEASURED_LOADS)
                ideal(bench, path)
            else:
                speeds(bench, path, size, {8: MEASURED_LOADS[8]})
            path.unlink()
    bench.finish()


if __name__ == "__main__":
    main()
