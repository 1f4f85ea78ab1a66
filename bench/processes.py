"""What do leases cost that processes share over a broker, and how fast do models change places?

    python bench/processes.py

The bench owns the arena and serves it. Its clients are processes of their own. It compares changes
of models between two clients with changes inside one process, in turns. Then it kills brokers and
clients, whose leases must stay right.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Process
from pathlib import Path

from lib.harness import MIB, Bench, interleaved, quantile, ratio, scratch, write_checkpoint
from parts.processes.chaos import chaos
from parts.processes.client import Client
from parts.processes.kept_broker import KeptBroker
from warmserve_rt import Broker, Runtime
from warmserve_rt.core.broker_status import broker_status

GRANULE = 2 * MIB
SMALL_LAYERS, SMALL = 8, 16 * MIB  # a model of 64 granules
GRANULES = SMALL_LAYERS * SMALL // GRANULE
SWAPPED, QUICK_SWAPPED = 492 * MIB, 48 * MIB
SWAPPED_LAYERS = 24


def checkpoint(directory: Path, name: str, layers: int, layer_bytes: int) -> Path:
    """Write a model of equal layers."""
    path = directory / f"{name}.safetensors"
    write_checkpoint(path, {f"model.layers.{i}.weight": (layer_bytes // 2,) for i in range(layers)})
    return path


@contextmanager
def served(directory: Path, granules: int) -> Iterator[tuple[Runtime, Path]]:
    """Yield a runtime whose arena is served, and the path at which it is."""
    path = directory / "broker" / "socket"
    with (
        Runtime("host", arena=granules * GRANULE, granule=GRANULE, tensors="numpy") as runtime,
        Broker(runtime, path),
    ):
        yield runtime, path


def leases(bench: Bench, directory: Path) -> None:
    """Time leases that need no message, and leases that need the broker but no bytes."""
    model = checkpoint(directory, "small", SMALL_LAYERS, SMALL)
    rounds = bench.size(300, 20)
    with (
        served(directory, GRANULES) as (_, path),
        Client(path) as client,
        Client(path) as other,
    ):
        for each in (client, other):
            each.do("register", "small", str(model))
        other.do("lease", "small")  # the broker has the bytes from now on
        calls, blocks = client.do("time_guard", "small", bench.size(200, 5))
        taken = []
        for _ in range(rounds):
            client.do("unregister", "small")  # unmaps the layers
            client.do("register", "small", str(model))
            taken.append(client.do("lease", "small"))
    bench.target("client_lease_p50_us", calls * 1e6, "us", "<=", 0.5)
    bench.target("client_with_p50_us", blocks * 1e6, "us", "<=", 1.0)
    bench.target("broker_lease_p50_us", statistics.median(taken) * 1e6, "us", "<=", 150)
    bench.row("broker_lease_p99_us", quantile(taken, 0.99) * 1e6, "us")
    bench.row("round_trip_us", round_trip(rounds) * 1e6, "us")


def echo(end: socket.socket) -> None:
    while message := end.recv(64):
        end.send(message)


def round_trip(rounds: int) -> float:
    """Return the median seconds of a message to another process and back, by bare sockets."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    process = Process(target=echo, args=(theirs,), daemon=True)
    process.start()
    samples = []
    for _ in range(rounds):
        began = time.perf_counter()
        ours.send(b"x" * 32)
        ours.recv(64)
        samples.append(time.perf_counter() - began)
    process.kill()
    process.join()
    return statistics.median(samples)


def revocations(bench: Bench, directory: Path) -> None:
    """Time the eviction of a model that a client has mapped, while the client is idle and while
    clients compute on all processors."""
    model = checkpoint(directory, "small", SMALL_LAYERS, SMALL)
    rounds = bench.size(300, 10)
    with served(directory, GRANULES) as (runtime, path), ExitStack() as stack:
        client = stack.enter_context(Client(path))
        busy = [stack.enter_context(Client(path)) for _ in range(2)]
        runtime.register("small", model)
        client.do("register", "small", str(model))

        def evict() -> float:
            client.do("lease", "small")
            began = time.perf_counter()
            runtime.evict("small")
            return time.perf_counter() - began

        idle = [evict() for _ in range(rounds)]
        for each in busy:
            each.start("compute", bench.size(20.0, 0.5))
        loaded = []
        until = time.perf_counter() + bench.size(15.0, 0.3)
        while time.perf_counter() < until:
            loaded.append(evict())
        for each in busy:
            each.answer()
    bench.target("revoke_64_p50_us", statistics.median(idle) * 1e6, "us", "<=", 100)
    bench.row("revoke_64_p99_us", quantile(idle, 0.99) * 1e6, "us")
    bench.target("revoke_p99_us", quantile(loaded, 0.99) * 1e6, "us", "<=", 5000)


def swaps(bench: Bench, directory: Path) -> None:
    """Compare swaps between two clients with swaps inside one process."""
    layer = bench.size(SWAPPED, QUICK_SWAPPED) // SWAPPED_LAYERS // GRANULE * GRANULE
    paths = [checkpoint(directory, name, SWAPPED_LAYERS, layer) for name in ("first", "second")]
    granules = SWAPPED_LAYERS * layer // GRANULE
    turn = {"between": 0, "inside": 0}
    with (
        served(directory, granules) as (_, path),
        Client(path) as one,
        Client(path) as two,
        Runtime("host", arena=granules * GRANULE, granule=GRANULE, tensors="numpy") as alone,
    ):
        for client, name, model in zip((one, two), ("first", "second"), paths, strict=True):
            client.do("register", name, str(model))
            alone.register(name, model)

        def between() -> float:
            turn["between"] += 1
            which = turn["between"] % 2
            return float((one, two)[which].do("lease", ("first", "second")[which]))

        def inside() -> float:
            turn["inside"] += 1
            began = time.perf_counter()
            with alone.lease(("first", "second")[turn["inside"] % 2]):
                return time.perf_counter() - began

        samples = interleaved({"between": between, "inside": inside}, bench.args.rounds)
    for name, taken in samples.items():
        bench.row(f"swap_{name}_ms", statistics.median(taken) * 1e3, "ms")
    found = ratio(samples["between"], samples["inside"])
    bench.target("swap_between_processes_vs_inside", found, "", "<=", 1.15)


def restarts(bench: Bench, directory: Path) -> None:
    """Time a restart of the broker, until a process that is new leases a model that the last broker
    has loaded; and what the new broker has loaded for it."""
    model = checkpoint(directory, "small", SMALL_LAYERS, SMALL)
    path = directory / "broker" / "socket"
    serving, leasing = [], []
    with KeptBroker(path, GRANULES, GRANULE) as broker:
        with Client(path) as first:
            first.do("register", "small", str(model))
            first.do("lease", "small")
        for _ in range(bench.size(20, 2)):
            began = time.perf_counter()
            broker.kill()
            serving.append(time.perf_counter() - began)
            with Client(path) as client:
                client.do("register", "small", str(model))
                leasing.append(client.do("lease", "small"))
        loaded = broker_status(path).nbytes_loaded
    bench.row("broker_restart_ms", statistics.median(serving) * 1e3, "ms")
    bench.row("lease_after_restart_ms", statistics.median(leasing) * 1e3, "ms")
    bench.target("bytes_loaded_again", loaded, "", "=", 0)


def deaths(bench: Bench, directory: Path) -> None:
    """Kill and stop processes at random while clients lease, and count what went wrong."""
    layers, granules = 5, 10  # of a model, and of the arena, which has room for two of four
    models = {name: checkpoint(directory, name, layers, GRANULE) for name in "abcd"}
    path = directory / "broker" / "socket"
    found = chaos(path, models, granules, GRANULE, bench.args.chaos)
    bench.row("chaos_leases", found.leases, "")
    bench.row("chaos_client_deaths", found.client_deaths, "")
    bench.row("chaos_broker_deaths", found.broker_deaths, "")
    for name in ("wrong_bytes", "faults_under_lease", "granules_lost", "leases_lost"):
        bench.target(name, getattr(found, name), "", "=", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20, help="timed swaps, after one warm-up")
    parser.add_argument("--chaos", type=float, default=60.0, help="seconds of random deaths")
    bench = Bench.start("processes", parser, rounds=3, chaos=2.0)
    with scratch() as directory:
        leases(bench, directory)
        revocations(bench, directory)
        swaps(bench, directory)
        restarts(bench, directory)
        deaths(bench, directory)
    bench.finish()


if __name__ == "__main__":
    main()
