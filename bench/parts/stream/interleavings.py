"""Random programs of all layer operations, on the host and the simulated device.

The programs compare every leased byte. They are the tests' own, run as a program.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from time import perf_counter

from lib.harness import Bench, scratch
from lib.support import SUPPORT

DEVICES = ("host", "simcuda")
PROGRAM = SUPPORT / "layer_programs.py"


def interleavings(bench: Bench, pump: int, threaded: int) -> None:
    """Run `pump` stepped programs of one thread and `threaded` programs with several threads, half
    of them on each device."""
    reached: Counter[str] = Counter()
    begin, wrong, failed = perf_counter(), 0, 0
    with scratch() as folder:
        for device in DEVICES:
            result = folder / f"{device}.json"
            numbers = ["--programs", str(pump // 2), "--threaded", str(threaded // 2)]
            options = ["--device", device, "--json", str(result)]
            done = subprocess.run([sys.executable, str(PROGRAM), *numbers, *options])
            if not result.exists():
                raise RuntimeError(f"{PROGRAM.name} ended with status {done.returncode}")
            found = json.loads(result.read_text())
            reached += found["reached"]
            wrong += found["wrong_bytes"]
            failed += found["failed"]
    bench.row("programs", pump, "")
    bench.row("programs_of_several_threads", threaded, "")
    for what, times in reached.items():
        bench.row(re.sub(r"\W+", "_", what.lower()), times, "")
    bench.row("interleavings_s", perf_counter() - begin, "s")
    bench.target("wrong_bytes", wrong, "", "=", 0)
    bench.target("failed_programs", failed, "", "=", 0)
