"""How fast does a model in the host cache become resident, and what does the cache cost?

    python bench/host_cache.py

Loads of a model of 1 GiB out of the host cache take turns with a plain copy of as many bytes
between two buffers. The device is the host without access to its granules, so that every load
passes pinned memory, as on a discrete GPU. The kernel counts the bytes that the loads read of
files. Then more models than the cache holds are loaded in turns.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lib.harness import MIB, Bench, Llama, interleaved, ratio, scratch, seconds, write_checkpoint
from warmserve_rt import Runtime, _native

GRANULE, UNIT = 2 * MIB, 2 * MIB  # of the arena, and of the host cache
SLACK = 128 * MIB, 32 * MIB  # a layer ends inside a granule and a unit
PIECE = 2 * MIB  # of a prewarm's copies: a quarter of a chunk
MODEL, QUICK = Llama(2048, 5632, 256, 32000, 9), Llama(512, 1408, 64, 4000, 3)
SMALL, QUICK_SMALL = Llama(1024, 2816, 256, 8000, 8), Llama(256, 704, 64, 2000, 2)
TENANTS = 5  # of which the cache holds two and a half


@contextmanager
def runtime_for(bench: Bench, nbytes: int, host_cache: int) -> Iterator[Runtime]:
    """Yield a runtime whose arena has room for one model of `nbytes`."""
    driver = _native.host_driver(host_view=False)
    with Runtime(
        driver=driver,
        arena=nbytes + bench.size(*SLACK),
        granule=GRANULE,
        host_cache=host_cache,
        tensors="numpy",
    ) as runtime:
        yield runtime


class FileReads:
    """Counts the bytes that all threads of this process read by system calls, as the kernel does.

    The count does not depend on the runtime. Reads through a mapping of a file are not in it.
    """

    def __init__(self) -> None:
        self._begin, self._own = self._read()

    def nbytes(self) -> int:
        """Return the bytes since this object was made."""
        return self._read()[0] - self._begin - self._own

    @staticmethod
    def _read() -> tuple[int, int]:
        """Return the count, and the bytes of the file that has it: the count grows by these."""
        text = Path("/proc/self/io").read_bytes()
        return int(text.split()[1]), len(text)


def copy(target: npt.NDArray[np.uint8], source: npt.NDArray[np.uint8], piece: int) -> None:
    """Copy in pieces. The C library bypasses the processor's cache only for large pieces."""
    to, begin = target.ctypes.data, source.ctypes.data
    for at in range(0, source.nbytes, piece):
        ctypes.memmove(to + at, begin + at, min(piece, source.nbytes - at))


def speed(bench: Bench, directory: Path) -> None:
    """Compare loads out of the host cache with a copy of as many bytes by one thread.

    The loads' copies have one thread too: that of the stream on which they are.
    """
    path = directory / "model.safetensors"
    size = write_checkpoint(path, bench.size(MODEL, QUICK).shapes())
    with runtime_for(bench, size, host_cache=size + bench.size(*SLACK)) as runtime:
        model = runtime.register("model", path)
        filling = FileReads()
        runtime.prewarm(model, to="host").wait()  # also waits until memory is pinned
        filled = filling.nbytes()
        misses = runtime.snapshot().host_cache.misses
        assert filled >= model.nbytes, "the kernel does not count the bytes of files"
        assert str(path) not in Path("/proc/self/maps").read_text(), "the file is mapped"
        source, target = (np.full(model.nbytes, fill, np.uint8) for fill in (1, 2))
        reads: list[int] = []

        def load() -> float:
            runtime.evict(model)
            counted = FileReads()
            taken = seconds(lambda: runtime.prewarm(model).wait())
            reads.append(counted.nbytes())
            return taken

        runs = {
            "load": load,
            "memcpy": lambda: seconds(lambda: copy(target, source, model.nbytes)),
            "memcpy_in_pieces": lambda: seconds(lambda: copy(target, source, PIECE)),
        }
        samples = interleaved(runs, bench.args.rounds)
        assert runtime.snapshot().host_cache.misses == misses, "a load has missed the cache"
    for name, taken in samples.items():
        bench.row(f"{name}_gb_per_s", model.nbytes / statistics.median(taken) / 1e9, "GB/s")
    bench.target("host_cache_vs_memcpy", ratio(samples["memcpy"], samples["load"]), "", ">=", 0.9)
    in_pieces = ratio(samples["memcpy_in_pieces"], samples["load"])
    bench.row("host_cache_vs_memcpy_in_pieces", in_pieces, "")
    bench.row("file_bytes_read_to_fill", filled, "bytes")
    bench.target("file_bytes_read", sum(reads), "bytes", "=", 0)


def budget(bench: Bench, directory: Path) -> None:
    """Load more models than the host cache holds, in turns, and look at its pinned bytes."""
    path = directory / "small.safetensors"
    size = write_checkpoint(path, bench.size(SMALL, QUICK_SMALL).shapes())
    most = looks = 0
    with runtime_for(bench, size, host_cache=5 * size // 2 // UNIT * UNIT) as runtime:
        models = [runtime.register(f"model {number}", path) for number in range(TENANTS)]
        for _ in range(bench.args.rounds):
            for model in models:
                ticket = runtime.prewarm(model)
                while not ticket.done:
                    state = runtime.snapshot().host_cache
                    most = max(most, state.pinned_bytes - state.budget_bytes)
                    looks += 1
                ticket.wait()
        state = runtime.snapshot().host_cache
        assert state.evictions, "the cache holds all models"
        assert state.pinned_bytes == state.budget_bytes, state.error
    bench.row("host_cache_budget_mib", state.budget_bytes / MIB, "MiB")
    bench.row("host_cache_looks", looks, "looks")
    bench.row("host_cache_evictions", state.evictions, "layers")
    bench.target("host_cache_over_budget_bytes", most, "bytes", "=", 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one warm-up")
    bench = Bench.start("host_cache", parser, rounds=1)
    with scratch() as directory:
        speed(bench, directory)
        budget(bench, directory)
    bench.finish()


if __name__ == "__main__":
    main()
