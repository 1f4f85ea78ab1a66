"""When does a partly resident model produce its first token, and how does that slow down others?

    python bench/stream.py

The bench compares times with a lower bound for any loader: each layer takes its compute time, and
none begins before its bytes have arrived. Its parts are: a real language model on the host device,
with loading 0.5, 1 and 4 times as long as computing; a simulated CUDA device with exact time; a
start beside continuous prewarming; the time until a cancelled load releases its layer; and random
programs that compare every leased byte.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path
from time import perf_counter

from lib.harness import MIB, Bench, Llama, scratch, write_checkpoint
from parts.stream.interleavings import interleavings
from parts.stream.simulated import ttft_on_the_simulator
from warmserve_rt import Runtime

RATIOS = [0.5, 1.0, 4.0]
CANCELLED = Llama(1024, 2816, 256, 8000, 12)
QUICK_CANCELLED = Llama(256, 704, 64, 2000, 4)


def cancel(bench: Bench, folder: Path, rounds: int) -> None:
    """Measure the time from cancel() until the layer that was loading has released its granules.

    The bound is the time of one chunk at the source's bandwidth, plus 1 ms.
    """
    path = folder / "cancelled.safetensors"
    nbytes = write_checkpoint(path, bench.size(CANCELLED, QUICK_CANCELLED).shapes())
    chunk, bandwidth = 8 * MIB, 2e9
    taken = []
    with Runtime(
        arena=2 * nbytes + 32 * MIB, chunk=chunk, loaders=1, read_bandwidth=int(bandwidth)
    ) as runtime:
        runtime.register("m", path)
        for _ in range(rounds):
            ticket = runtime.prewarm("m")
            time.sleep(random.uniform(0.1, 0.9) * nbytes / bandwidth)
            begin = perf_counter()
            ticket.cancel()
            while any(x.residency == "filling" for x in runtime.snapshot().models["m"].layers):
                time.sleep(0)
            taken.append((perf_counter() - begin) * 1e3)
            runtime.evict("m")
    bench.row("cancel_ms_p50", statistics.median(taken), "ms")
    bound = chunk / bandwidth * 1e3 + 1
    p99 = statistics.quantiles(taken, n=100, method="inclusive")[-1]
    bench.target("cancel_ms_p99", p99, "ms", "<=", bound)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each timed start")
    parser.add_argument("--every", type=int, default=1, help="step of the number of layers kept")
    parser.add_argument("--programs", type=int, default=10_000, help="random stepped programs")
    parser.add_argument("--threaded", type=int, default=1_000, help="random programs with threads")
    parser.add_argument(
        "--only",
        choices=["host", "simulator", "foreground", "cancel", "interleavings"],
        help="run only this part",
    )
    bench = Bench.start("stream", parser, rounds=1, every=3, programs=4, threaded=2)
    only = bench.args.only
    with scratch() as folder:
        if only in (None, "simulator"):
            print("first tokens on a simulated CUDA device", flush=True)
            ttft_on_the_simulator(bench, folder, RATIOS)
        if only in (None, "cancel"):
            print("cancelled loads", flush=True)
            cancel(bench, folder, bench.size(300, 3))
        if only in (None, "host", "foreground"):
            from parts.engines.random_models import make_tiny
            from parts.stream.host import foreground_slowdown, ttft_on_the_host
            from warmserve_rt.demo.tenants import make_tenants

            if bench.args.quick:
                path = make_tiny(folder / "tiny")
            else:
                (path,) = make_tenants(lambda what, done, of: None, count=1).values()
            if only != "foreground":
                print("first tokens of a language model on the host", flush=True)
                ttft_on_the_host(bench, path, RATIOS, bench.args.rounds, bench.args.every)
            if only != "host":
                print("a start beside prewarming", flush=True)
                foreground_slowdown(bench, path, 1.0, bench.args.rounds)
    if only in (None, "interleavings"):
        print("random programs", flush=True)
        interleavings(bench, bench.args.programs, bench.args.threaded)
    bench.finish()


if __name__ == "__main__":
    main()
