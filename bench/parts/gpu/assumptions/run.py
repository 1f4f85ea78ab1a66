"""Runs the rows in processes and collects their outcomes.

A process runs rows one after the other until a row breaks its context, kills it or hangs it. The
next process continues after that row.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from time import monotonic

from lib.cuda import Gpu, code

from . import ALL, Assumption, Outcome, outcome_of

ROW_LIMIT = 30.0  # seconds for one row, including the start of its process
_NO_TIME = "no time was left"
_BENCH = Path(__file__).resolve().parents[3]


def load_all() -> None:
    """Import the modules that add rows."""
    from . import capture, codes, costs, fatal, host, memory, work  # noqa: F401


def worker(names: Sequence[str], out: Path) -> None:
    """Run rows in this process; append a line of JSON after each."""
    load_all()
    cuda = Gpu()
    context = cuda.current()
    with out.open("a") as file:
        for name in names:
            outcome = outcome_of(ALL[name], cuda)
            file.write(json.dumps(asdict(outcome)) + "\n")
            file.flush()
            cuda.set_current(context)
            cuda.exchange_mode(0)
            if code(cuda.context_synchronize):
                break  # another process continues
    os._exit(0)  # a normal exit could hang in a broken driver


def run_all(environment: Mapping[str, str], *, only: str = "", limit: float = 180) -> list[Outcome]:
    """Run all rows whose name contains `only`; after `limit` seconds the rest is not run."""
    load_all()
    deadline = monotonic() + limit
    rows = [row for row in ALL.values() if only in row.name]
    outcomes: dict[str, Outcome] = {}
    for batch in [[row for row in rows if not row.alone], *[[row] for row in rows if row.alone]]:
        while batch := [row for row in batch if row.name not in outcomes]:
            left = deadline - monotonic()
            done = (
                _run_batch(batch, environment, left)
                if left > 0
                else [_not_run(row, _NO_TIME) for row in batch]
            )
            outcomes.update((outcome.name, outcome) for outcome in done)
    return [outcomes[row.name] for row in rows]


def _not_run(row: Assumption, why: str) -> Outcome:
    return Outcome(row.name, row.assumes, row.source, "not run", why)


def _run_batch(
    batch: Sequence[Assumption], environment: Mapping[str, str], left: float
) -> list[Outcome]:
    """Run rows in one process until one ends it; return at least one outcome.

    Each row has ROW_LIMIT seconds, regardless of the time that earlier rows took.
    """
    with tempfile.TemporaryDirectory(prefix="warmserve-rows-") as folder:
        out, errors = Path(folder, "out"), Path(folder, "errors")
        out.touch()
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", __package__, str(out), *[row.name for row in batch]],
                env={**environment, "PYTHONPATH": _python_path(environment)},
                stdout=stderr,
                stderr=stderr,
                start_new_session=True,
            )
        try:
            why = _watch(process, out, left)
        finally:  # the process hangs, or this one was interrupted
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        lines = [line for line in out.read_text().splitlines() if line.endswith("}")]
        done = [Outcome(**json.loads(line)) for line in lines]
        if len(done) < len(batch) and why:
            said = errors.read_text(errors="replace").strip().splitlines()
            last = f" ({said[-1][:200]})" if said else ""
            row = batch[len(done)]
            done.append(
                _not_run(row, why)
                if why == _NO_TIME
                else Outcome(row.name, row.assumes, row.source, "refuted", why + last)
            )
    return done


def _watch(process: subprocess.Popen[bytes], out: Path, left: float) -> str:
    """Wait until the process ends; return the reason if a row caused it, otherwise ""."""
    end, seen, since = monotonic() + left, 0, monotonic()
    while True:
        try:
            status = process.wait(0.05)
        except subprocess.TimeoutExpired:
            if (size := out.stat().st_size) > seen:
                seen, since = size, monotonic()
            if monotonic() > since + ROW_LIMIT:
                return f"not finished within {ROW_LIMIT:g} s"
            if monotonic() > end:
                return _NO_TIME
            continue
        if status < 0:
            return f"a process killed by {signal.Signals(-status).name}"
        return (
            f"a process that ended with status {status}" if status or not out.stat().st_size else ""
        )


def _python_path(environment: Mapping[str, str]) -> str:
    return os.pathsep.join(filter(None, [str(_BENCH), environment.get("PYTHONPATH", "")]))


def table(outcomes: Sequence[Outcome]) -> str:
    width = max((len(outcome.name) for outcome in outcomes), default=0)
    lines = [f"  {o.name:<{width}}  {o.source:<5}  {o}" for o in outcomes]
    counts = {
        kind: sum(o.outcome == kind for o in outcomes)
        for kind in ("confirmed", "refuted", "not run")
    }
    return "\n".join([*lines, "  " + ", ".join(f"{n} {kind}" for kind, n in counts.items())])
