"""How much memory does a process need to serve a model, besides the arena and staging?

A child process loads a checkpoint, leases it, reads all of it through its tensors, evicts it and
loads it again, while this process watches its proportional set size. Everything beyond the arena
and the pinned memory counts: interpreter, numpy, libraries, bookkeeping.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lib.harness import MIB, Bench, Llama, scratch, write_checkpoint

CHECKPOINTS = {  # GiB
    "0.2": Llama(1024, 2816, 256, 32000, 4),
    "4": Llama(2048, 5632, 256, 32000, 46),
}
QUICK = {"0.2": Llama(256, 704, 64, 2000, 2)}
PERIOD = 0.002  # seconds between two samples


def serve(path: Path, arena: int, staged: bool) -> None:
    """Run the watched process and print its report."""
    began = pss(Path("/proc/self"))
    from warmserve_rt import Runtime, _native

    imported = pss(Path("/proc/self"))
    driver = _native.host_driver(host_view=False) if staged else None
    with Runtime(arena=arena, tensors="numpy", driver=driver) as runtime:
        model = runtime.register("model", path)
        for _ in range(2):
            runtime.prewarm(model).wait()
            with runtime.lease(model) as lease:
                for name in lease.tensors:
                    lease.tensors[name].max()
            runtime.evict(model)
        taken = runtime.snapshot()
    report = {
        "interpreter": began,
        "imported": imported,
        "arena": taken.arena_bytes,
        "pinned": taken.pinned_bytes,
        "torch": "torch" in sys.modules,
    }
    print(json.dumps(report))


def pss(process: Path) -> int:
    """Return the proportional set size in bytes."""
    lines = (process / "smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def watch(path: Path, arena: int, staged: bool) -> dict[str, int]:
    """Run the process; return its report, its peak in bytes and the number of samples.

    The process is stopped for each sample. An arena is mapped at two addresses, and half of it is
    counted at each. If a page were unmapped from one of them while the kernel counts, the page
    would be counted one and a half times.
    """
    command = [sys.executable, __file__, "--serve", str(path), "--arena", str(arena)]
    child = subprocess.Popen(command + ["--staged"] * staged, stdout=subprocess.PIPE)
    peak = looks = 0
    while True:
        time.sleep(PERIOD)
        os.kill(child.pid, signal.SIGSTOP)
        _, status = os.waitpid(child.pid, os.WUNTRACED)  # all of its threads have stopped
        if not os.WIFSTOPPED(status):
            break
        peak = max(peak, pss(Path("/proc") / str(child.pid)))
        looks += 1
        os.kill(child.pid, signal.SIGCONT)
    child.returncode = os.waitstatus_to_exitcode(status)
    output, _ = child.communicate()
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    report = json.loads(output)
    if report["torch"]:
        raise RuntimeError("the process imported torch")
    return {**report, "peak": peak, "looks": looks}


def measure(bench: Bench) -> None:
    worst = 0.0
    with scratch() as directory:
        for size, llama in bench.size(CHECKPOINTS, QUICK).items():
            path = directory / "model.safetensors"
            arena = write_checkpoint(path, llama.shapes()) + 128 * MIB
            for how in ("direct", "staged"):
                report = watch(path, arena, how == "staged")
                over = (report["peak"] - report["arena"] - report["pinned"]) / 1e6
                worst = max(worst, over)
                for name in ("imported", "arena", "pinned", "peak"):
                    bench.row(f"{how}_{size}_gib_{name}_mb", report[name] / 1e6, "MB")
                bench.row(f"{how}_{size}_gib_over_mb", over, "MB")
                bench.row(f"{how}_{size}_gib_looks", report["looks"], "looks")
    bench.target("peak_over_mb", worst, "MB", "<=", 150)
    bench.finish()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arena", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--staged", action="store_true", help=argparse.SUPPRESS)
    bench = Bench.start("memory", parser)
    if bench.args.serve:
        serve(bench.args.serve, bench.args.arena, bench.args.staged)
    else:
        measure(bench)


if __name__ == "__main__":
    main()
