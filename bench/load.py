"""How fast does a checkpoint that the page cache holds become a resident model?

A Llama-shaped bf16 checkpoint of 2 GiB, from its path to all of its layers resident; beside the
other ways to get at its bytes, and beside what the machine can do at all.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import torch
from _harness import (
    GIB,
    LLAMA_2GIB,
    MIB,
    Bench,
    huge_share,
    interleaved,
    ratio,
    scratch,
    seconds,
    write_checkpoint,
)
from safetensors.torch import load_file

from warmserve_rt import Runtime

ARENA = int(2.25 * GIB)
CHUNK, GRANULE = 8 * MIB, 2 * MIB
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which the mmap module does not name
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


def into_arena(runtime: Runtime, path: Path) -> float:
    """Seconds from the path to every layer resident. Giving the model up again is not timed."""

    def load() -> None:
        runtime.register("model", path)
        runtime.prewarm("model").wait()

    taken = seconds(load)
    runtime.unregister("model")
    return taken


def cloned(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor in memory of its own: what a device has to do that maps no files."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def copied(path: Path, into: memoryview) -> None:
    """Every tensor copied, one after the other, into memory that is there already."""
    memory, end = torch.frombuffer(into, dtype=torch.uint8), 0
    for tensor in load_file(path).values():
        begin, end = end, end + tensor.nbytes
        memory[begin:end] = tensor.reshape(-1).view(torch.uint8)


def huge_pages(nbytes: int) -> mmap.mmap:
    """Private memory that is there already, in huge pages."""
    memory = mmap.mmap(-1, -(-nbytes // GRANULE) * GRANULE, mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    memory.madvise(_POPULATE_WRITE)
    return memory


def read(path: Path, into: memoryview, threads: int) -> None:
    """Reads the whole file, with nothing else to do: the machine's limit."""
    offsets = itertools.count(0, CHUNK)

    def work() -> None:
        with open(path, "rb", buffering=0) as file:
            while (at := next(offsets)) < len(into):
                piece = into[at : at + CHUNK]
                if os.preadv(file.fileno(), [piece], at) != len(piece):
                    raise OSError(f"short read at byte {at} of {path}")

    workers = [Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


def afresh(work: Callable[[], object]) -> float:
    """Seconds that it takes, with enough free memory that the machine really has.

    A virtual machine may have lent its free memory to its host, and then waits milliseconds for
    each 2 MiB of it. That is neither ours nor safetensors', so it happens before the clock starts.
    """
    huge_pages(ARENA).close()
    return seconds(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed, after one that is not")
    parser.add_argument("--chunk", default="8MiB", help="of the runtime (default: 8MiB)")
    bench = Bench.start("load", parser)
    device, chunk, rounds = bench.args.device, bench.args.chunk, bench.args.rounds
    torch.set_num_threads(1)
    # Otherwise the C library keeps some of the freed clones' memory, which is not fresh then.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)

    def make_arena(loaders: int) -> Runtime:
        return Runtime(device, ARENA, chunk=chunk, loaders=loaders)

    with scratch() as directory, make_arena(1) as one, make_arena(2) as two:
        path = directory / "model.safetensors"
        nbytes = write_checkpoint(path, LLAMA_2GIB.shapes())
        memory = memoryview(huge_pages(nbytes))[:nbytes]
        samples = interleaved(
            {
                "warmserve": lambda: into_arena(two, path),
                "limit": lambda: seconds(lambda: read(path, memory, 2)),
                "warmserve_one_loader": lambda: into_arena(one, path),
                "limit_one_thread": lambda: seconds(lambda: read(path, memory, 1)),
                "safetensors_clone": lambda: afresh(lambda: cloned(path)),
                "safetensors_copy": lambda: seconds(lambda: copied(path, memory)),
                "safetensors_mmap": lambda: seconds(lambda: load_file(path)),
                "arena": lambda: afresh(lambda: make_arena(1)),
            },
            rounds,
        )
        arena = one.snapshot().arena_bytes
        bench.row("checkpoint_mib", nbytes / MIB, "MiB")
        bench.row("arena_huge_share", huge_share(2 * arena), "of the arena")

    per_granule = [1e6 * taken / (arena // GRANULE) for taken in samples.pop("arena")]
    for name, taken in samples.items():
        bench.row(f"{name}_ms", 1e3 * statistics.median(taken), "ms")
        if name != "safetensors_mmap":  # which moves no bytes
            bench.row(f"{name}_gb_per_s", nbytes / statistics.median(taken) / 1e9, "GB/s")
    bench.row("arena_us_per_granule", statistics.median(per_granule), "us")
    ours = samples["warmserve"]
    clone_ratio = ratio(samples["safetensors_clone"], ours)
    bench.target("load_vs_safetensors_clone", clone_ratio, "times", ">=", 2.5)
    bench.target("load_vs_limit", ratio(samples["limit"], ours), "times", ">=", 0.8)
    bench.finish()


if __name__ == "__main__":
    main()
