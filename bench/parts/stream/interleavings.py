"""Random programs of all layer operations, on the host and the simulated device.

The programs compare every leased byte; see tests/support/layer_programs.py.
"""

from __future__ import annotations

import re
from collections import Counter
from time import perf_counter

from lib.harness import Bench, scratch

DEVICES = ("host", "simcuda")


def interleavings(bench: Bench, pump: int, threaded: int) -> None:
    """Run `pump` stepped programs of one thread and `threaded` programs with several threads."""
    from layer_programs import REACHED, Hung, run, run_threads
    from layer_world import Contents, Failed, WrongBytes

    counts: Counter[str] = Counter()
    begin, wrong, failed = perf_counter(), 0, 0
    with scratch() as folder:
        for place, device in enumerate(DEVICES):
            contents = Contents(folder, device)
            for program, number in ((run, pump), (run_threads, threaded)):
                for seed in range(place, number, len(DEVICES)):
                    try:
                        counts += program(seed, contents)
                    except WrongBytes as error:
                        wrong += error.count
                        print(error, flush=True)
                    except Hung:
                        raise
                    except Failed as error:
                        failed += 1
                        print(error, flush=True)
    bench.row("programs", pump, "")
    bench.row("programs_of_several_threads", threaded, "")
    for what in REACHED:
        bench.row(re.sub(r"\W+", "_", what.lower()), counts[what], "")
    bench.row("interleavings_s", perf_counter() - begin, "s")
    bench.target("wrong_bytes", wrong, "", "=", 0)
    bench.target("failed_programs", failed, "", "=", 0)
