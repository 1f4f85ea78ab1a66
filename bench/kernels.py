"""How fast are the weight kernels on a CPU, compared with reading and copying the same bytes?

The bench uses one thread and buffers larger than any cache. Kernel and copy take turns; the result
is the ratio within a round.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np

from lib.harness import MIB, Bench, interleaved, ratio, seconds
from warmserve_rt import kernels

WIDTHS = {  # bytes of an element, in and out
    "f32_to_bf16": (4, 2),
    "f32_to_f16": (4, 2),
    "f16_to_f32": (2, 4),
    "f16_to_bf16": (2, 2),
    "bf16_to_f32": (2, 4),
    "bf16_to_f16": (2, 2),
    "f8_e4m3_to_bf16": (1, 2),
    "f8_e5m2_to_bf16": (1, 2),
}
COLUMNS = 4096
BLOCKS = {"128x128": (128, 128), "tensor": (1 << 40, 1 << 40), "column": (1 << 40, 1)}
# Shards of bf16 matrices of Llama 3 8B and 70B: bytes of a row's part, and of the row.
SHARDS = {
    "8b_o_proj_tp2": (4096, 8192),
    "8b_o_proj_tp4": (2048, 8192),
    "8b_o_proj_tp8": (1024, 8192),
    "8b_down_proj_tp2": (14336, 28672),
    "8b_down_proj_tp8": (3584, 28672),
    "70b_o_proj_tp8": (2048, 16384),
    "70b_down_proj_tp8": (7168, 57344),
}


class Memory:
    """Two filled buffers, and the plain read and copy that kernels are compared with."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        words = np.random.default_rng(0).integers(0, 1 << 63, nbytes // 8, dtype=np.int64)
        self.source = words.view(np.uint8)
        self.target = np.ones(nbytes, np.uint8)

    def read(self, nbytes: int) -> None:
        """Sum 64-bit words; numpy's loop does little more than load them."""
        self.source[:nbytes].view(np.uint64).sum()

    def copy(self, nbytes: int) -> None:
        """Copy `nbytes` with memcpy, which moves twice as many bytes: in and out."""
        self.target[:nbytes].data[:] = self.source[:nbytes].data


def compare(
    bench: Bench, name: str, nbytes: int, kernel: Callable[[], object], plain: Callable[[], object]
) -> float:
    """Record GB/s of both, each of which moves `nbytes`; return the kernel's relative speed."""
    runs = {"kernel": lambda: seconds(kernel), "plain": lambda: seconds(plain)}
    samples = interleaved(runs, bench.args.rounds)
    for key, label in (("kernel", name), ("plain", f"{name}_beside")):
        bench.row(f"{label}_gbps", nbytes / statistics.median(samples[key]) / 1e9, "GB/s")
    share = ratio(samples["plain"], samples["kernel"])
    bench.row(f"{name}_ratio", share, "")
    return share


def casts(bench: Bench, memory: Memory) -> dict[str, float]:
    """Return the speed relative to a copy, for each kind and, with scales, each shape of blocks."""
    shares = {}
    for kind, (wide, narrow) in WIDTHS.items():
        count = memory.nbytes // max(wide, narrow) // COLUMNS * COLUMNS
        source = memory.source[: count * wide]
        target = memory.target[: count * narrow]
        moved = count * (wide + narrow)
        shares[kind] = compare(
            bench,
            kind,
            moved,
            partial(kernels.cast, kind, source, target),
            partial(memory.copy, moved // 16 * 8),
        )
        if wide > 1:
            continue
        for label, block in BLOCKS.items():
            matrix = source.reshape(-1, COLUMNS)
            shape = (-(-len(matrix) // block[0]), -(-COLUMNS // block[1]))
            scales = np.random.default_rng(1).random(shape, np.float32)
            shares[f"{kind}_{label}"] = compare(
                bench,
                f"{kind}_{label}",
                moved,
                partial(kernels.cast, kind, matrix, target, scales, block=block),
                partial(memory.copy, moved // 16 * 8),
            )
    return shares


def gathers(bench: Bench, memory: Memory) -> dict[str, float]:
    shares = {}
    for name, (row_bytes, pitch) in SHARDS.items():
        rows = memory.nbytes // pitch
        shares[name] = compare(
            bench,
            f"gather_{name}",
            2 * rows * row_bytes,
            partial(
                kernels.gather_rows,
                memory.source,
                memory.target[: rows * row_bytes],
                rows=rows,
                row_bytes=row_bytes,
                pitch=pitch,
            ),
            partial(memory.copy, rows * row_bytes),
        )
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds, after one warm-up")
    parser.add_argument("--mib", type=int, default=192, help="size of a buffer (default: 192)")
    bench = Bench.start("kernels", parser, rounds=1, mib=2)
    memory = Memory(bench.args.mib * MIB)
    digest = compare(
        bench,
        "digest",
        memory.nbytes,
        lambda: kernels.granule_digest(memory.source),
        lambda: memory.read(memory.nbytes),
    )
    kinds = casts(bench, memory)
    shards = gathers(bench, memory)
    bench.target("digest_vs_read", digest, "", ">=", 0.5)
    bench.target("cast_vs_copy", min(kinds.values()), "", ">=", 0.5)
    bench.target("gather_vs_copy", min(shards.values()), "", ">=", 0.5)
    unscaled = min(share for name, share in kinds.items() if name in WIDTHS)
    bench.row("cast_without_scales_vs_copy", unscaled, "")
    bench.finish()


if __name__ == "__main__":
    main()
