"""How fast does a checkpoint in the page cache become a resident model?

The bench times a Llama-shaped bf16 checkpoint of 2 GiB, from its path to all layers resident. It
compares this with other ways to read the bytes and with the machine's limit. It then times an f32
checkpoint of 1 GiB that is cast to bf16 while it is loaded.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import mmap
import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import torch
from safetensors.torch import load_file

from lib.harness import (
    GIB,
    LLAMA_1GIB_OF_F32,
    LLAMA_2GIB,
    MIB,
    Bench,
    Llama,
    huge_share,
    interleaved,
    ratio,
    scratch,
    seconds,
    write_checkpoint,
)
from warmserve_rt import Runtime

ARENA, CHUNK, GRANULE = int(2.25 * GIB), 8 * MIB, 2 * MIB
QUICK, QUICK_ARENA = Llama(256, 704, 64, 2000, 2), 32 * MIB
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, which is missing from the mmap module
_M_MMAP_THRESHOLD = -3  # of mallopt(3)


@contextmanager
def huge_pages(nbytes: int) -> Iterator[memoryview]:
    """Yield private memory that is already populated with huge pages."""
    with mmap.mmap(-1, -(-nbytes // GRANULE) * GRANULE, mmap.MAP_PRIVATE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.madvise(_POPULATE_WRITE)
        with memoryview(memory) as whole, whole[:nbytes] as view:
            yield view


def reclaim(nbytes: int = ARENA) -> None:
    """Make sure that the machine really has as much memory as it reports as free.

    A virtual machine may have lent free memory to its host, and then waits milliseconds for each
    2 MiB. This affects all candidates equally, so we do it before timing starts.
    """
    with huge_pages(nbytes):
        pass


def read(path: Path, into: memoryview, threads: int) -> None:
    """Read the whole file and do nothing else: the machine's limit."""
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


def clone(path: Path) -> dict[str, torch.Tensor]:
    """Copy every tensor into memory of its own, as a device that cannot map files must do."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def copy(path: Path, into: memoryview) -> None:
    """Copy every tensor into existing memory, one after the other."""
    memory, end = torch.frombuffer(into, dtype=torch.uint8), 0
    for tensor in load_file(path).values():
        begin, end = end, end + tensor.nbytes
        memory[begin:end] = tensor.reshape(-1).view(torch.uint8)


def convert(path: Path) -> dict[str, torch.Tensor]:
    """Convert every tensor to bf16, in memory of its own."""
    return {name: tensor.to(torch.bfloat16) for name, tensor in load_file(path).items()}


def convert_into(path: Path, into: memoryview) -> None:
    """Convert every tensor to bf16 in existing memory, one after the other."""
    memory, end = torch.frombuffer(into, dtype=torch.bfloat16), 0
    for tensor in load_file(path).values():
        begin, end = end, end + tensor.numel()
        memory[begin:end] = tensor.reshape(-1)


class Ways:
    """The ways to load `path`.

    Each call allocates new memory, because one piece of memory may be slower than another as long
    as it is held. The allocation is timed only if the method says so.
    """

    def __init__(self, path: Path, device: str, chunk: str, arena: int) -> None:
        self.path, self.device, self.chunk, self.arena = path, device, chunk, arena
        self.nbytes = path.stat().st_size
        self.arena_us: list[float] = []  # per granule
        self.huge_shares: list[float] = []

    def warmserve(self, loaders: int, dtype: str | None = None) -> float:
        made: list[Runtime] = []
        reclaim(self.arena)
        taken = seconds(
            lambda: made.append(
                Runtime(
                    self.device,
                    self.arena,
                    granule=GRANULE,
                    chunk=self.chunk,
                    loaders=loaders,
                    tensors="torch",
                )
            )
        )
        self.arena_us.append(1e6 * taken / (self.arena // GRANULE))
        with made.pop() as runtime:
            self.huge_shares.append(huge_share(self.arena))

            def load() -> None:
                runtime.register("model", self.path, dtype=dtype)
                runtime.prewarm("model").wait()

            return seconds(load)

    def limit(self, threads: int) -> float:
        reclaim(self.arena)
        with huge_pages(self.nbytes) as memory:
            return seconds(lambda: read(self.path, memory, threads))

    def safetensors_clone(self) -> float:
        """Time cloning; includes the allocation."""
        reclaim(self.arena)
        return seconds(lambda: clone(self.path))

    def safetensors_copy(self) -> float:
        reclaim(self.arena)
        with huge_pages(self.nbytes) as memory:
            return seconds(lambda: copy(self.path, memory))

    def torch_to(self) -> float:
        """Time the conversion; includes the allocation."""
        reclaim(self.arena)
        return seconds(lambda: convert(self.path))

    def torch_copy(self) -> float:
        reclaim(self.arena)
        with huge_pages(self.nbytes // 2) as memory:
            return seconds(lambda: convert_into(self.path, memory))

    def safetensors_mmap(self) -> float:
        return seconds(lambda: load_file(self.path))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one warm-up")
    parser.add_argument("--chunk", default="8MiB", help="runtime's chunk (default: 8MiB)")
    bench = Bench.start("load", parser, rounds=1)
    torch.set_num_threads(1)
    # Otherwise the C library would keep some memory of freed clones and reuse it.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, MIB)

    arena = bench.size(ARENA, QUICK_ARENA)
    with scratch() as directory:
        path = directory / "model.safetensors"
        nbytes = write_checkpoint(path, bench.size(LLAMA_2GIB, QUICK).shapes())
        ways = Ways(path, bench.args.device, bench.args.chunk, arena)
        runs: dict[str, Callable[[], float]] = {
            "warmserve": lambda: ways.warmserve(2),
            "limit": lambda: ways.limit(2),
            "warmserve_one_loader": lambda: ways.warmserve(1),
            "limit_one_thread": lambda: ways.limit(1),
            "safetensors_clone": ways.safetensors_clone,
            "safetensors_copy": ways.safetensors_copy,
            "safetensors_mmap": ways.safetensors_mmap,
        }
        samples = interleaved(runs, bench.args.rounds)
        wide = write_checkpoint(path, bench.size(LLAMA_1GIB_OF_F32, QUICK).shapes(), "F32")
        of_f32 = Ways(path, bench.args.device, bench.args.chunk, arena)
        casts: dict[str, Callable[[], float]] = {
            "f32_uncast": lambda: of_f32.warmserve(1),
            "f32_as_bf16": lambda: of_f32.warmserve(1, "bfloat16"),
            "f32_torch_to_bf16": of_f32.torch_to,
            "f32_torch_to_bf16_in_place": of_f32.torch_copy,
        }
        cast_samples = interleaved(casts, bench.args.rounds)

    bench.row("checkpoint_mib", nbytes / MIB, "MiB")
    for name, taken in samples.items():
        bench.row(f"{name}_ms", 1e3 * statistics.median(taken), "ms")
        if name != "safetensors_mmap":  # mmap moves no bytes
            bench.row(f"{name}_gb_per_s", nbytes / statistics.median(taken) / 1e9, "GB/s")
    bench.row("arena_us_per_granule", statistics.median(ways.arena_us), "us")
    bench.row("arena_huge_share", min(ways.huge_shares), "of the arena")
    ours = samples["warmserve"]
    fastest = min(samples["limit"] + samples["limit_one_thread"]) / min(ours)
    bench.row("load_vs_limit_fastest", fastest, "times")
    bench.target(
        "load_vs_safetensors_clone", ratio(samples["safetensors_clone"], ours), "times", ">=", 2.5
    )
    bench.target("load_vs_limit", ratio(samples["limit"], ours), "times", ">=", 0.8)
    bench.row("f32_checkpoint_mib", wide / MIB, "MiB")
    for name, taken in cast_samples.items():
        bench.row(f"{name}_ms", 1e3 * statistics.median(taken), "ms")
        if name != "f32_as_bf16":
            bench.row(f"{name}_vs_cast", ratio(taken, cast_samples["f32_as_bf16"]), "times")
    bench.finish()


if __name__ == "__main__":
    main()
