"""Random programs of all operations on layers, in which every leased byte is compared.

    python tests/support/layer_programs.py --programs 1000 --threaded 100 --device simcuda

A seed names a program. With one thread and a pumped runtime, the program runs the same way each
time, and a failing program is shrunk to a small set of its operations that still fails. With
several threads, the seed determines the operations of each thread, and the machine their timing.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Collection
from pathlib import Path

from layer_operations import Operations, operations
from layer_world import GRANULES, Contents, Failed, World, WrongBytes, world

REACHED = (
    "leases, complete",
    "leases, streaming, a layer missing",
    "copies ordered behind a layer that is still filling",
    "leases released during a fill",
    "tickets cancelled during a fill",
    "evictions of filling layers",
    "refused: Busy",
)


class Hung(Failed):
    """Threads of a program did not end. No other program can run beside them."""


def run(seed: int, contents: Contents, only: Collection[int] | None = None) -> Counter[str]:
    """Run a program of one thread, which steps the runtime.

    Parameters
    ----------
    seed : int
        Names the program.
    contents : Contents
        The checkpoints, and the device to run on.
    only : collection of int, optional
        Indices of the operations to run; None: all.

    Returns
    -------
    Counter of str
        How often the program reached each interesting situation, such as those of REACHED.

    Raises
    ------
    Failed
        With the trace of the program.
    """
    rng = random.Random(f"program {seed}")
    trace: list[str] = []
    try:
        with world(seed, contents, pump=True, tapes=2) as made:
            actor = Operations(made, made.tapes, trace=trace)
            try:
                for i, kind in enumerate(operations(rng, threaded=False)):
                    if only is None or i in only:
                        actor.perform(kind, random.Random(f"{seed} {i}"))
            finally:
                actor.release_all()
            if rng.random() < 0.7:  # else the runtime is closed while work is in progress
                _run_until_idle(made, actor)
            actor.tickets.clear()
    except Exception as error:
        raise _named(error, f"seed {seed} on {contents.device}", trace) from error
    return made.counts


def _run_until_idle(made: World, actor: Operations) -> None:
    for _ in range(3000):
        if not made.runtime.step():
            break
    else:
        raise Failed("the runtime still has work after 3000 steps")
    if not all(ticket.done for ticket, _ in actor.tickets):
        raise Failed("the runtime has no more work, but a ticket is not done")
    made.check()


def run_threads(seed: int, contents: Contents, timeout: float = 60) -> Counter[str]:
    """Run three or four threads, each with its own program, on one runtime with loader threads.

    Parameters
    ----------
    seed : int
        Names the programs.
    contents : Contents
        The checkpoints, and the device to run on.
    timeout : float
        Seconds in which all threads must end.

    Returns
    -------
    Counter of str
        How often the programs reached each interesting situation.

    Raises
    ------
    Failed
        The first failure, with the trace of its thread.
    Hung
        A thread did not end in time. The stacks of all threads are printed before.
    """
    count = random.Random(f"threads {seed}").randint(3, 4)
    where = f"threaded seed {seed} on {contents.device}"
    failures: list[Failed] = []
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with world(seed, contents, pump=False, tapes=2 * count) as made:
            actors = [Operations(made, made.tapes[2 * i : 2 * i + 2]) for i in range(count)]

            def act(number: int, actor: Operations) -> None:
                rng = random.Random(f"thread {number} of {seed}")
                try:
                    for kind in operations(rng, threaded=True):
                        if made.failed.is_set():
                            break
                        actor.perform(kind, rng)
                except Exception as error:
                    made.failed.set()
                    failures.append(_named(error, f"{where}, thread {number}", actor.trace))
                finally:
                    actor.release_all()
                    actor.tickets.clear()

            threads = [
                threading.Thread(target=act, args=each, daemon=True) for each in enumerate(actors)
            ]
            for thread in threads:
                thread.start()
            end = time.monotonic() + timeout
            for thread in threads:
                thread.join(max(0, end - time.monotonic()))
            if any(thread.is_alive() for thread in threads):
                faulthandler.dump_traceback(all_threads=True)
                raise Hung(f"{where} hangs: {[actor.trace[-1] for actor in actors]}")
            if failures:
                raise failures[0]
            known = {model.name for model in made.runtime.models}
            if known != set(made.runtime.snapshot().models):
                raise Failed(f"the snapshot has other models than the runtime's {sorted(known)}")
            made.check()
    except Failed:
        raise
    except Exception as error:
        raise _named(error, where, []) from error
    finally:
        sys.setswitchinterval(interval)
    return made.counts


def _named(error: Exception, where: str, trace: list[str]) -> Failed:
    told = "\n".join([f"{where}: {type(error).__name__}: {error}", *trace])
    if isinstance(error, WrongBytes):
        return WrongBytes(told, error.count, error.first)
    return Failed(told)


def shrink(seed: int, contents: Contents) -> Failed | None:
    """Shrink a program and return the failure of its shortest failing part found, or None."""
    kept = list(range(60))
    found: Failed | None = None
    size = 32
    while size:
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            try:
                run(seed, contents, fewer)
                at += size
            except Failed as error:
                kept, found = fewer, error
        size //= 2
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--programs", type=int, default=1000)
    parser.add_argument("--threaded", type=int, default=100)
    parser.add_argument("--device", choices=GRANULES, default="host")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    args = parser.parse_args()
    faulthandler.enable()
    counts: Counter[str] = Counter()
    failed = wrong_bytes = 0
    with tempfile.TemporaryDirectory() as folder:
        contents = Contents(Path(folder), args.device)
        for how, number in ((run, args.programs), (run_threads, args.threaded)):
            begin = time.perf_counter()
            for seed in range(args.seed, args.seed + number):
                try:
                    counts += how(seed, contents)
                except Failed as error:
                    failed += 1
                    wrong_bytes += error.count if isinstance(error, WrongBytes) else 0
                    shorter = shrink(seed, contents) if how is run else None
                    print(shorter or error, flush=True)
                    if isinstance(error, Hung):
                        raise
            print(f"{number} programs in {time.perf_counter() - begin:.1f} s", flush=True)
    for what, times in sorted(counts.items()):
        print(f"{times:8} {what}")
    print(f"{failed:8} failed")
    if args.json:
        reached = {what: counts[what] for what in REACHED}
        args.json.write_text(
            json.dumps({"reached": reached, "failed": failed, "wrong_bytes": wrong_bytes})
        )
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
