"""The harness of every bench: arguments, report, interleaved runs and checkpoints."""

from __future__ import annotations

import argparse
import json
import math
import operator
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn, Protocol, TypeVar

GIB, MIB = 1 << 30, 1 << 20
_WIDTHS = {"BF16": 2, "F32": 4}  # bytes of an element
Interval = tuple[float, float] | None  # low and high
_COMPARE = {"<=": operator.le, ">=": operator.ge, "=": operator.eq}
_NOT_RUN = 3  # exit status of a bench that cannot run here
T = TypeVar("T")


class Results(Protocol):
    """The part of a bench that measurements use, so that they can also run elsewhere."""

    args: argparse.Namespace

    def row(self, name: str, value: float, unit: str) -> None: ...
    def target(self, name: str, value: float, unit: str, op: str, bound: float) -> None: ...
    def size(self, whole: T, quick: T) -> T: ...


@dataclass
class Bench:
    """One bench: its arguments and results. A missed target is a result, not a failure.

    With ``--quick`` a bench runs at its smallest size, which shows only that it works: the values
    mean nothing, and no bound is judged.
    """

    name: str
    args: argparse.Namespace
    results: dict[str, float] = field(default_factory=dict)
    targets: list[dict[str, object]] = field(default_factory=list)
    intervals: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def start(cls, name: str, parser: argparse.ArgumentParser, **quick: Any) -> Bench:
        """Parse the command line.

        `parser` has the bench's own arguments, and `quick` the defaults of some with ``--quick``.
        """
        parser.add_argument("--json", type=Path, metavar="FILE", help="write results to this file")
        parser.add_argument("--device", default="host", help="runtime's device (default: host)")
        parser.add_argument(
            "--quick",
            action="store_true",
            help="run at the smallest size, to see that the bench works; judge no bound",
        )
        if parser.parse_args().quick:
            parser.set_defaults(**quick)
        return cls(name, parser.parse_args())

    def size(self, whole: T, quick: T) -> T:
        """Return the size of something: ``whole``, or ``quick`` with ``--quick``."""
        return quick if self.args.quick else whole

    def row(self, name: str, value: float, unit: str, interval: Interval = None) -> None:
        """Record and print a result, with its 95 % interval if it has one."""
        self.results[name] = _round(value)
        within = self._within(name, interval)
        print(f"  {name:<32} {self.results[name]:>10} {unit}{within}", flush=True)

    def target(
        self, name: str, value: float, unit: str, op: str, bound: float, interval: Interval = None
    ) -> None:
        """Record and print a result and whether the value, not its interval, meets its bound."""
        met = self.size(_COMPARE[op](value, bound), None)
        self.results[name] = value = _round(value)
        self.targets.append({"name": name, "value": value, "op": op, "bound": bound, "met": met})
        verdict = {True: "met", False: "MISSED", None: "not judged"}[met]
        within = self._within(name, interval)
        print(f"* {name:<32} {value:>10} {unit:<6} {op} {bound:g}: {verdict}{within}", flush=True)

    def _within(self, name: str, interval: Interval) -> str:
        if interval is None:
            return ""
        self.intervals[name] = [_round(end) for end in interval]
        low, high = self.intervals[name]
        return f"  [{low:g}, {high:g}]"

    def finish(self) -> None:
        """Write the JSON file, if ``--json`` was given."""
        report = {
            "bench": self.name,
            "commit": _commit(),
            "machine": _machine(),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "results": self.results,
            "targets": self.targets,
            "intervals": self.intervals,
        }
        if self.args.json:
            self.args.json.write_text(json.dumps(report, indent=2) + "\n")


def not_run(why: str) -> NoReturn:
    """Say why this bench cannot run here, and exit with status 3."""
    print(f"not run: {why}", file=sys.stderr)
    sys.exit(_NOT_RUN)


def interleaved(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the results of each run in each round, after one round of warm-up.

    Every round performs all runs, so that a slow phase of the machine affects all of them.
    """
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            value = run()
            if number:
                samples[name].append(value)
    return samples


def ratio(above: list[float], below: list[float]) -> float:
    """Return the median of the ratios of each round; it varies less than a ratio of medians."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def quantile(samples: Iterable[float], q: float) -> float:
    """Return the quantile `q` of the samples, which is one of them."""
    ordered = sorted(samples)
    return ordered[int(q * (len(ordered) - 1))]


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds until `work` returns; freeing its result is not timed."""
    begin = perf_counter()
    result = work()
    taken = perf_counter() - begin
    del result
    return taken


@dataclass(frozen=True)
class Llama:
    """The shapes of a Llama model, in elements."""

    hidden: int
    intermediate: int
    kv: int
    vocabulary: int
    blocks: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the tensors' shapes under Hugging Face's names, in the order of execution."""
        hidden, wide, kv = self.hidden, self.intermediate, self.kv
        block = {
            "input_layernorm": (hidden,),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "post_attention_layernorm": (hidden,),
            "mlp.gate_proj": (wide, hidden),
            "mlp.up_proj": (wide, hidden),
            "mlp.down_proj": (hidden, wide),
        }
        return {
            "model.embed_tokens.weight": (self.vocabulary, hidden),
            **{
                f"model.layers.{i}.{name}.weight": shape
                for i in range(self.blocks)
                for name, shape in block.items()
            },
            "model.norm.weight": (hidden,),
            "lm_head.weight": (self.vocabulary, hidden),
        }


LLAMA_2GIB = Llama(2048, 5632, 256, 32000, 22)  # TinyLlama 1.1B: 2.05 GiB
LLAMA_1GIB_OF_F32 = Llama(2048, 5632, 256, 32000, 3)  # 0.98 GiB


def write_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> int:
    """Write a safetensors file of random bytes to the disk; return its size in bytes.

    The content repeats one random block from a different offset each time: no two pages are equal,
    and writing 4 GiB takes seconds.
    """
    text, end = _header(shapes, dtype)
    block = memoryview(os.urandom(16 * MIB))
    with open(path, "wb") as file:
        file.write(text)
        for number, left in enumerate(range(end, 0, -8 * MIB)):
            start = number * 4099 % (8 * MIB)
            file.write(block[start : start + min(left, 8 * MIB)])
        file.flush()
        os.fsync(file.fileno())  # otherwise write-back would continue during measurements
    return path.stat().st_size


def write_hollow_checkpoint(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Write a bf16 safetensors file whose tensors are a hole; return its size in bytes.

    The tensors may have any size, read as zeros and take no disk space.
    """
    text, end = _header(shapes, "BF16")
    with open(path, "wb") as file:
        file.write(text)
        file.truncate(len(text) + end)
    return path.stat().st_size


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: str) -> tuple[bytes, int]:
    """Return the start of a file with tensors of this dtype, and the number of bytes after it."""
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + _WIDTHS[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


@contextmanager
def scratch(parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary directory for checkpoints; remove it afterwards."""
    with tempfile.TemporaryDirectory(prefix="warmserve-bench-", dir=parent) as directory:
        yield Path(directory)


def huge_share(nbytes: int) -> float:
    """Return the shared memory that this process maps in huge pages, as a share of `nbytes`."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("ShmemPmdMapped:"):
            return int(line.split()[1]) * 1024 / nbytes
    return 0.0


def _round(value: float) -> float:
    """Round to four digits; more are not reproducible."""
    return value if isinstance(value, int) else float(f"{value:.4g}")


def _commit() -> str:
    """Return the checkout's commit, with a mark if files were changed."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    quiet = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, env=quiet, capture_output=True, text=True
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {memory:.0f} GiB, Linux {platform.release()}"
